"""Boundaries that an engine does not capture are refused."""

import pytest

from eagle3_offline.draft.layout import refuse_unservable
from eagle3_offline.records import UserError

LLAMA, GPT_OSS = ({"model_type": name, "num_hidden_layers": 8} for name in ("llama", "gpt_oss"))


def test_sglang_captures_what_enters_a_layer():
    for layers, target in (((1, 7), LLAMA), ((1, 8), GPT_OSS), ((1, 7), {"model_type": "gemma3", "text_config": LLAMA})):
        refuse_unservable(layers, "sglang", target)
    for to in ("vllm", "hf"):
        refuse_unservable((0, 8), to, LLAMA)


@pytest.mark.parametrize("layers, target", [((0, 4), LLAMA), ((2, 8), LLAMA), ((0, 4), GPT_OSS)])
def test_others_are_refused(layers, target):
    with pytest.raises(UserError, match="export.to is sglang, which captures the boundaries 1 to"):
        refuse_unservable(layers, "sglang", target)
