"""The recipes that a user starts from: each parses, and fits the target that it names. The configs' values are the targets' own."""

import re
from pathlib import Path

import pytest
import torch

from eagle3_offline.config import load_recipe
from eagle3_offline.draft.model import DraftHead
from eagle3_offline.draft.settings import draft_settings
from eagle3_offline.store.estimate import estimate
from eagle3_offline.store.format import Compact, DumpSpec
from eagle3_offline.training.engine import deepspeed_json, engine_config

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def shape(hidden, intermediate, heads, kv_heads, vocab, layers, eps, positions, theta, head_dim=None, **more) -> dict:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "num_hidden_layers": layers, "rms_norm_eps": eps, "max_position_embeddings": positions, "rope_theta": theta,
        "head_dim": head_dim, **more,
    }  # fmt: skip


TARGETS = {  # name: what its config.json says, parameters of the draft in millions (counted by hand), gigabytes as the recipe says
    "llama-3.1-8b": (shape(4096, 14336, 32, 8, 128256, 32, 1e-5, 131072, 5e5, rope_scaling=LLAMA3), 425, 9.2, 1.26),
    "llama-3.3-70b": (shape(8192, 28672, 64, 8, 128256, 80, 1e-5, 131072, 5e5, rope_scaling=LLAMA3), 1403, 18.4, 2.48),
    "qwen3-8b": (shape(4096, 12288, 32, 8, 151936, 36, 1e-6, 40960, 1e6, head_dim=128), 400, 9.2, 1.26),
    "qwen3-30b-a3b": (shape(2048, 6144, 32, 4, 151936, 48, 1e-6, 40960, 1e6, head_dim=128), 145, 4.6, 0.64),
    "gpt-oss-20b": (shape(2880, 2880, 64, 8, 201088, 24, 1e-5, 131072, 150000, head_dim=64, rope_scaling=YARN), 279, 6.5, 0.89),
}


def test_every_published_recipe_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*TARGETS, "demo", "demo-tiny", "lab"}


@pytest.mark.parametrize("name", ["demo", "demo-tiny", "lab"])
def test_a_recipe_for_this_machine(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.train.ttt_length == recipe.evaluate.chain == 4


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipe_fits_its_target(name):
    config, millions, _, _ = TARGETS[name]
    recipe = load_recipe(name)
    assert recipe.name == name
    layers = config["num_hidden_layers"]
    settings = draft_settings(config, (2, layers // 2, layers - 3), recipe.train.draft_vocab_size)
    with torch.device("meta"):
        head = DraftHead(settings)
    assert round(sum(parameter.numel() for parameter in head.parameters()) / 1e6) == pytest.approx(millions, rel=0.01)
    assert settings.rope_parameters["rope_theta"] == config["rope_theta"]


def test_the_seed_tutorials_settings():
    train = load_recipe("llama-3.1-8b").train
    assert (train.learning_rate, train.total_steps, train.draft_vocab_size, train.ttt_length) == (5e-5, 800_000, 32_000, 7)


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipe_states_the_disk_that_the_estimate_counts(name):
    config, _, lossless, compact = TARGETS[name]
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]

    def terabytes(reduced):
        spec = DumpSpec(
            layers=(2, layers // 2, layers - 3), hidden_size=hidden, vocab_size=config["vocab_size"], dtype="bfloat16",
            codec="int8" if reduced else "lossless", last_codec=None if reduced else "lossless", compact=reduced, target={}, engine={},
            max_length=4096, conversation={},
        )  # fmt: skip
        return estimate(spec, 320_000, 400_000_000, 300_000_000).bytes / 1e12

    assert terabytes(None) == pytest.approx(lossless, abs=0.06)
    small = load_recipe(name).dump  # the default's sizes, also where the recipe's mode is another
    assert terabytes(Compact(small.compact_rank(hidden), small.top_k, "basis")) == pytest.approx(compact, abs=0.006)
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert re.search(rf"# Disk.*{lossless} TB lossless; {compact} TB", text)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_deepspeed_json_is_read(stage):
    config = load_recipe(None, (f"train.deepspeed=zero{stage}", "train.dtype=float32")).train
    assert deepspeed_json(config)["zero_optimization"]["stage"] == stage
    assert engine_config(config, 2)["zero_optimization"]["stage"] == stage
