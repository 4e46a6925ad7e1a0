"""A small draft and a hand-made conversation of 12 tokens with two assistant turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eagle3_offline.draft.model import new_head
from eagle3_offline.draft.settings import DraftSettings
from eagle3_offline.records import Sample

LAYERS = (2, 4, 5)
HIDDEN, VOCAB, DRAFT_VOCAB = 16, 40, 24
TURNS = ((3, 7), (9, 12))


@pytest.fixture
def settings() -> DraftSettings:
    return DraftSettings(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        layers=LAYERS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=64,
    )


@pytest.fixture
def head(settings):
    torch.manual_seed(0)
    head = new_head(settings, seed=1).double()
    with torch.no_grad():
        for parameter in head.parameters():  # norms too, so that none is the identity
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


@pytest.fixture
def embed() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def lm_head() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def target_ids() -> torch.Tensor:
    """Every token but those divisible by three, so that some teachers' argmax is outside."""
    return torch.tensor([i for i in range(VOCAB) if i % 3])[:DRAFT_VOCAB]


def make_sample(name: str, length: int, turns: tuple, seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    supervised = np.zeros(length + 2, bool)
    for start, end in turns:
        supervised[start + 1 : end + 1] = True
    keep = np.flatnonzero(supervised[:-2] | supervised[1:-1] | supervised[2:])  # m[t-1], m[t] or m[t+1]
    return Sample(
        id=name,
        input_ids=rng.integers(0, VOCAB, length).astype(np.int32),
        turns=turns,
        aux=np.concatenate([rng.normal(size=(length, HIDDEN)) for _ in LAYERS], axis=1),
        last=rng.normal(size=(length, HIDDEN))[keep],
        last_positions=keep,
    )


@pytest.fixture
def sample() -> Sample:
    return make_sample("hand-made", 12, TURNS, seed=4)


@pytest.fixture
def samples(sample):
    """The hand-made one, one without a live row, and two more."""
    return [
        sample,
        make_sample("b", 10, ((4, 9),), seed=8),
        make_sample("dead", 5, ((3, 4),), seed=9),
        make_sample("c", 12, ((2, 12),), 7),
    ]
