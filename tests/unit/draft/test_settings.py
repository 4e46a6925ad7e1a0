"""The draft's shape from the target's config.json, old and new spellings."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from eagle3_offline.draft.model import Rotary
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


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}}, "each kind of layer"),
    ],
)
def test_other_rotary_embeddings_are_refused(more, reason):
    with pytest.raises(UserError, match=reason):
        rope(**more)


ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0},
    {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "truncate": False},  # gpt-oss
]


@pytest.mark.parametrize("parameters", ROPES, ids=lambda value: value["rope_type"])
def test_queries_turn_as_in_transformers(parameters):
    """Against the target's own module, over all positions that it may see."""
    parameters = {**parameters, "rope_theta": 1e4}
    own = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(own)(torch.empty(0), torch.arange(512)[None])
    x = torch.randn(1, 4, 512, 16, generator=torch.Generator().manual_seed(0))  # [batch, heads, positions, d]
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    settings = draft_settings({**CONFIG, "rope_parameters": parameters}, (2, 4, 5), 50)
    found = Rotary(settings)(x[0].transpose(0, 1), torch.arange(512))  # [positions, heads, d]
    assert torch.allclose(found.transpose(0, 1), expected[0], atol=1e-5)


def test_a_draft_has_no_more_tokens_than_the_target():
    assert draft_settings(CONFIG, (2, 4, 5), 32000).draft_vocab_size == 100
