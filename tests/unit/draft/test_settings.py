"""The draft's shape from the target's config.json, old and new spellings."""

import pytest

from eagle3_offline.draft.settings import draft_settings
from eagle3_offline.records import UserError

CONFIG = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 5e5,
}  # fmt: skip


def rope(**more):
    return draft_settings({**CONFIG, **more}, (2, 4, 5), 50).rope_parameters


def test_rope_is_the_targets():
    assert rope() == {"rope_type": "default", "rope_theta": 5e5}
    assert rope(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})["factor"] == 8.0
    assert rope(rope_scaling={"type": "linear", "factor": 2.0}) == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}


@pytest.mark.parametrize("more", [{"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_parameters": {"rope_type": "longrope"}}])
def test_angles_that_depend_on_the_length_are_refused(more):
    with pytest.raises(UserError, match="rope_type"):
        rope(**more)


def test_a_draft_has_no_more_tokens_than_the_target():
    assert draft_settings(CONFIG, (2, 4, 5), 32000).draft_vocab_size == 100


@pytest.mark.parametrize("more", [{"final_logit_softcapping": 30.0}, {"logit_scale": 0.5}])
def test_heads_that_do_more_than_multiply_are_refused(more):
    with pytest.raises(UserError, match="supported so far"):
        draft_settings({**CONFIG, **more}, (2, 4, 5), 50)
