"""Boundaries that an engine does not capture are refused."""

import pytest

from eagle3_offline.draft.layout import refuse_unservable
from eagle3_offline.records import UserError

LLAMA, QWEN, GPT_OSS = ({"model_type": name, "num_hidden_layers": 8} for name in ("llama", "qwen3", "gpt_oss"))


def test_what_an_engine_captures_is_let_through():
    for layers, target in (((1, 7), LLAMA), ((0, 7), QWEN), ((1, 8), GPT_OSS), ((1, 7), {"model_type": "vision", "text_config": LLAMA})):
        refuse_unservable(layers, "sglang", target)
    for to in ("vllm", "hf"):
        refuse_unservable((0, 8), to, LLAMA)


@pytest.mark.parametrize("layers, target, named", [((0, 4, 8), LLAMA, "0, 8"), ((2, 8), QWEN, "8")])
def test_others_are_refused(layers, target, named):
    with pytest.raises(UserError, match=f"does not capture the boundaries .{named}. of a {target['model_type']} of 8 layers"):
        refuse_unservable(layers, "sglang", target)
