"""The LK losses through the real loop, and steps whose loss is not finite."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump
from eagle3_offline.training import data
from eagle3_offline.training.metrics import read_metrics


@pytest.mark.parametrize("loss", ["lk-alpha", "lk-lambda"])
def test_an_lk_loss_trains_and_resumes_exactly(copied, loss):
    """The mean acceptance of the step before is in the checkpoint, so that a resume changes nothing."""
    options = ("--set", f"train.loss={loss}", "--set", "train.learning_rate=2e-3")
    copied.stage("train", *options)
    folder = Run(copied.run).draft("draft")
    whole = read_metrics(folder / "metrics.csv")
    assert np.mean([line["alpha_0"] for line in whole[-3:]]) > np.mean([line["alpha_0"] for line in whole[:3]])
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    (folder / "draft.json").unlink()
    copied.stage("train", *options)
    assert [line["loss"] for line in read_metrics(folder / "metrics.csv")] == [line["loss"] for line in whole]


@pytest.fixture
def poison(monkeypatch):
    """poison(names): the captured states of these rows (of all, for None) are not finite."""

    def apply(names):
        sample = Dump.sample

        def poisoned(self, row, *more):
            found = sample(self, row, *more)
            bad = names is None or found.id in names
            return dataclasses.replace(found, aux=np.full_like(found.aux, 0x7FC0)) if bad else found  # bfloat16's NaN

        monkeypatch.setattr(Dump, "sample", poisoned)

    return apply


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_is_not_finite_is_skipped_and_its_rows_named(copied, poison, dtype):
    first = data.open_source(Run(copied.run).dump, data.TrainConfig(draft_vocab_size=128))
    name = first.dump.ids(int(first.train_rows[0]))
    poison({name})
    copied.stage("train", "--set", f"train.dtype={dtype}", "--set", "train.total_steps=14", "--set", "train.eval_every=0")
    folder = Run(copied.run).draft("draft")
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert 1 <= len(skipped) <= 3  # once an epoch of 24 rows, 4 a step
    assert all(line["reason"] == "the loss is not finite" and name in line["rows"] and len(line["rows"]) == 2 for line in skipped)
    lines = read_metrics(folder / "metrics.csv")
    bad = {line["step"] for line in skipped}
    assert all(np.isfinite(line["loss"]) == (line["step"] not in bad) for line in lines)  # what follows a skip is sound


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(copied, poison):
    poison(None)
    message = copied.stage("train", "--set", "train.eval_every=0", "--set", "train.checkpoint_every=100", exit_code=1)
    assert "not finite in 4 steps in a row, up to step 4" in message and "skipped.jsonl" in message
    assert (Run(copied.run).draft("draft") / "checkpoints" / "step-00000004").is_dir()
