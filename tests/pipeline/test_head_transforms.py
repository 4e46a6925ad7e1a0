"""A target that scales its logits (Granite) from its dump to a decoded draft, and the compact dump made of it."""

import shutil

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from eagle3_offline.config import load_recipe
from eagle3_offline.draft.batch import to_torch
from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump
from eagle3_offline.target.folder import read_config
from eagle3_offline.training.data import open_source

from ..small_runs import Cli, conversations, write_recipe

DIVISOR = 3.0
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@pytest.fixture(scope="module")
def granite(random_target, tmp_path_factory) -> Cli:
    """A dump of a random Granite of the random target's shape."""
    folder = tmp_path_factory.mktemp("granite")
    shutil.copytree(random_target, folder / "target")
    config = read_config(random_target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GraniteForCausalLM(GraniteConfig(**{name: config[name] for name in SHAPE}, logits_scaling=DIVISOR))
    model.to(torch.bfloat16).save_pretrained(folder / "target")
    shutil.copy(random_target / "generation_config.json", folder / "target")
    cli = Cli(write_recipe(folder, folder / "target", conversations(30), train={"total_steps": 2}), folder / "run")
    cli.phase_one()
    return cli


def test_it_trains_from_its_own_distribution_and_decodes(granite):
    source = open_source(granite.run / "dump", load_recipe(str(granite.recipe)).train)
    assert source.transform.scale == pytest.approx(1 / DIVISOR)
    head = source.new_head(load_recipe(str(granite.recipe)).train)  # served plain, so its rows are scaled
    assert torch.allclose(head.lm_head.weight, source.lm_head[source.target_ids].float() / DIVISOR)
    granite.stage("train")
    granite.stage("export")
    decoded = granite.stage("evaluate")["decoded"]
    assert decoded["identical"] == decoded["answers"]
    assert decoded["walk_tau"] == pytest.approx(decoded["tau"], abs=0.01)


def test_a_compact_dump_keeps_its_log_probabilities(granite):
    options = ("--set", "dump.mode=compact", "--set", "dump.top_k=8")
    granite.stage("store", "degrade", "--into", str(granite.run / "compact"), *options)
    full, compact = Dump.open(Run(granite.run).dump), Dump.open(granite.run / "compact")
    whole, kept = full.sample(0), compact.sample(0).top
    head = to_torch(full.target_tensors()["lm_head.weight"]).float()
    share = (to_torch(whole.last).float() @ head.T / DIVISOR).log_softmax(-1).gather(1, torch.from_numpy(kept.ids).long())
    assert torch.allclose(torch.from_numpy(kept.log_probs).float(), share, atol=4e-3, rtol=1e-3)
