"""Drafts narrower than their target, with an embedding of their own: trained, evaluated, exported and decoded."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eagle3_offline.draft.settings import draft_settings
from eagle3_offline.records import UserError
from eagle3_offline.runs import Run
from eagle3_offline.training.data import principal_embedding

from ..small_runs import losses

NARROW = ("--set", "train.hidden_size=16", "--set", "train.head_init=random", "--set", "train.total_steps=6")


def test_heads_and_mlp_shrink_with_the_width():
    llama = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    }  # fmt: skip
    found = draft_settings(llama, (2, 16, 29), 32000, hidden_size=2048)
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim, found.intermediate_size) == (16, 4, 128, 7168)
    assert (found.target_hidden_size, found.aux_width, found.owns_embedding) == (4096, 3 * 4096, True)
    assert not draft_settings(llama, (2, 16, 29), 32000, hidden_size=4096).owns_embedding
    with pytest.raises(UserError, match="at most as wide"):
        draft_settings(llama, (2, 16, 29), 32000, hidden_size=8192)
    with pytest.raises(UserError, match="choose a multiple of 16"):
        draft_settings(llama, (2, 16, 29), 32000, hidden_size=2040)


def test_the_start_keeps_what_a_width_can():
    """Rows in a plane of 3 dimensions: two numbers of each are enough."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(20, 2, generator=generator) @ torch.randn(2, 3, generator=generator)
    found = principal_embedding(flat, 2)
    assert torch.allclose(found @ found.T, flat @ flat.T, atol=1e-4)


def test_a_narrow_draft_trains_exports_and_decodes(copied):
    copied.stage("train", *NARROW)
    assert losses(copied)[-1] < losses(copied)[0]
    copied.stage("train", *NARROW, "--set", "train.draft=three", "--set", "train.deepspeed=zero3")
    assert losses(copied, "three") == pytest.approx(losses(copied), rel=1e-5)
    copied.stage("export", *NARROW)
    assert copied.stage("export", "--check", *NARROW)["problems"] == 0
    folder = Run(copied.run).draft("draft")
    config, tensors = json.loads((folder / "export" / "config.json").read_text()), load_file(folder / "export" / "model.safetensors")
    assert (config["hidden_size"], config["target_hidden_size"], config["num_attention_heads"], config["head_dim"]) == (16, 32, 2, 8)
    assert tensors["embed_tokens.weight"].shape == (config["vocab_size"], 16) and tensors["fc.weight"].shape == (16, 96)
    start = principal_embedding(load_file(copied.run / "dump" / "target" / "target.safetensors")["embed_tokens.weight"].float(), 16)
    assert 0 < (tensors["embed_tokens.weight"] - start).abs().max() < 0.1  # trained
    decoded = copied.stage("evaluate", *NARROW)["decoded"]
    assert decoded["identical"] == decoded["answers"]
    assert decoded["walk_tau"] == pytest.approx(decoded["tau"], abs=0.01)


def test_the_targets_rows_are_refused(copied):
    message = copied.stage("train", "--set", "train.hidden_size=16", exit_code=2)
    assert "set train.head_init=random" in message
    assert "leave train.fc_init random" in copied.stage("train", *NARROW, "--set", "train.fc_init=ridge", exit_code=2)
