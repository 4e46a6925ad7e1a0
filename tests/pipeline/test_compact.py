"""From a compact dump to a decoded export: train, evaluate, export without a dump, and decode."""

import json
import shutil

import numpy as np
import pytest
import torch

from eagle3_offline.draft.export import read_export
from eagle3_offline.draft.trained import load_trained
from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump
from eagle3_offline.training.metrics import read_metrics

from ..small_runs import Cli, conversations, write_recipe


@pytest.fixture(scope="module")
def compact(random_target, tmp_path_factory) -> Cli:
    """A trained draft of a compact dump, its projections not quantised."""
    folder = tmp_path_factory.mktemp("compact")
    settings = {"mode": "compact", "codec": "none", "rank": 1.0, "top_k": 8}
    cli = Cli(write_recipe(folder, random_target, conversations(30), dump=settings, target={"dtype": "float32"}), folder / "run")
    cli.phase_one(compact=True)
    cli.stage("train")
    return cli


def test_it_trains_evaluates_exports_and_decodes(compact):
    folder = Run(compact.run).draft("draft")
    losses = [line["loss"] for line in read_metrics(folder / "metrics.csv")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert "lower bound" in lines[-1]["teacher"] and all(0 <= alpha <= 1 for alpha in lines[-1]["alpha"])
    exported = compact.stage("export")
    assert exported["to"] == "sglang"
    found = compact.stage("evaluate")
    assert "top 8 logits" in found["held_out"]["teacher"]
    assert found["decoded"]["identical"] == found["decoded"]["answers"] == 3
    assert found["decoded"]["walk_tau"] == pytest.approx(found["decoded"]["tau"], abs=0.01)


def test_the_export_needs_no_dump_and_keeps_the_basis_digest(compact, tmp_path):
    cli = compact.copy(tmp_path / "run")
    digest = Dump.open(cli.run / "dump").spec.compact.basis
    shutil.rmtree(cli.run / "dump")
    cli.stage("export")
    folder = Run(cli.run).draft("draft")
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["eagle3_offline"]["basis"] == digest
    assert "rank 32" in config["eagle3_offline"]["projection"] and "rank" not in config
    assert (folder / "export" / "tokenizer.json").is_file()
    trained, (head, _) = load_trained(folder), read_export(folder / "export")
    aux = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32)
    ours = trained.head.fc(torch.from_numpy(trained.project(aux)))
    assert torch.allclose(head.fc(torch.from_numpy(aux)), ours, atol=1e-4)


@pytest.mark.parametrize(
    "setting, reason",
    [
        ("train.layers=[2, 4]", "projection of layers"),
        ("train.aux_scaling=false", "its projection holds the scaling"),
        ("train.fc_norm=true", "norms each layer before they are mixed"),
        ("train.start_from=elsewhere", "whose fc reads the captured states"),
    ],
)
def test_what_a_projection_cannot_give_is_refused(compact, setting, reason):
    assert reason in compact.stage("train", "--set", "train.draft=other", "--set", setting, exit_code=2)
