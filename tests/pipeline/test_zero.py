"""ZeRO stages, ranks and checkpoints: the same losses whatever the stage and the number of ranks, and a resume on another number."""

import json
import shutil

import pytest
import torch

from eagle3_offline.runs import Run
from eagle3_offline.training.metrics import read_metrics

from ..small_runs import Cli, losses, weights

APART = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def whole(dumped, tmp_path_factory) -> Cli:
    """An uninterrupted training of 8 steps at ZeRO-1 on one rank."""
    cli = dumped.copy(tmp_path_factory.mktemp("whole") / "run")
    cli.stage("train", *options(1))
    return cli


def options(stage: int, *more: str) -> list[str]:
    settings = (f"train.deepspeed=zero{stage}", "train.total_steps=8", "train.eval_every=4", *more)
    return [word for setting in settings for word in ("--set", setting)]


def assert_same(cli: Cli, other: Cli) -> None:
    assert losses(cli) == pytest.approx(losses(other), rel=1e-5)
    ours, theirs = weights(cli), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=2e-5), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_on_one_rank(whole, copied, stage):
    copied.stage("train", *options(stage))
    assert_same(copied, whole)


def test_zero_3_with_every_weight_taken_apart(whole, copied, tmp_path):
    """By default it keeps small weights whole, which here are all."""
    (tmp_path / "apart.json").write_text(json.dumps(APART))
    more = f"train.deepspeed={tmp_path / 'apart.json'}", "train.checkpoint_activations=true"
    copied.stage("train", *options(3, *more))
    assert_same(copied, whole)


def test_the_same_in_bfloat16(dumped, copied, tmp_path):
    """Whose products are our own functions (draft/products.py)."""
    (tmp_path / "apart.json").write_text(json.dumps(APART))
    one = dumped.copy(tmp_path / "one")
    one.stage("train", *options(1, "train.dtype=bfloat16"))
    copied.stage("train", *options(3, f"train.deepspeed={tmp_path / 'apart.json'}", "train.dtype=bfloat16"))
    assert losses(copied) == pytest.approx(losses(one), rel=1e-2)


def halfway(cli: Cli) -> None:
    """As if the training had been killed behind its checkpoint at step 4."""
    folder = Run(cli.run).draft("draft")
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    (folder / "draft.json").unlink()


@pytest.mark.parametrize("stage, first, second", [(0, 2, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2), (3, 1, 2), (3, 2, 1)])
def test_a_training_goes_on_with_another_number_of_ranks(whole, copied, stage, first, second):
    """Its first steps on `first` ranks, the others on `second`: all as on one rank at ZeRO-1."""
    copied.on_ranks(first, "train", *options(stage))
    halfway(copied)
    copied.on_ranks(second, "train", *options(stage))
    assert_same(copied, whole)


def test_another_stage_is_refused(copied):
    copied.stage("train", *options(2))
    halfway(copied)
    assert "deepspeed" in copied.stage("train", *options(1), exit_code=2)


def test_stage_0_with_bfloat16_is_refused(copied):
    message = copied.stage("train", *options(0, "train.dtype=bfloat16"), exit_code=2)
    assert "no fp32 masters" in message


def test_the_best_and_every_epochs_checkpoint_are_kept(copied):
    """24 rows, 4 a step: an epoch is 6 steps."""
    more = ("train.publish=best", "train.keep_epochs=true", "train.eval_every=2", "train.keep_checkpoints=1", "train.total_steps=14")
    summary = copied.stage("train", *options(1, *more))
    folder = Run(copied.run).draft("draft")
    taus = {line["step"]: line["tau"] for line in map(json.loads, (folder / "held_out.jsonl").read_text().splitlines()) if line["step"]}
    assert summary["tau"] == max(taus.values()) == taus[summary["best_step"]]
    steps = {int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")}
    assert steps == {6, 12, 14, summary["best_step"]}
    assert json.loads((folder / "checkpoints" / "pinned.json").read_text()) == {"best": summary["best_step"], "epoch-1": 6, "epoch-2": 12}


def test_epochs_end_a_training_before_its_total_steps(copied):
    """24 rows, 5 a step: the tenth step completes the second epoch. The learning rate is that of 40 steps."""
    more = ("train.epochs=2", "train.total_steps=40", "train.batch_size=5", "train.micro_batch_size=5", "train.warmup_ratio=0")
    assert copied.stage("train", *options(1, *more))["steps"] == 10
    rates = [line["learning_rate"] for line in read_metrics(Run(copied.run).draft("draft") / "metrics.csv")]
    assert rates[-1] > 0.8 * rates[0]
    assert copied.stage("train", *options(1, *more))["steps"] == 10  # nothing is left to do


def test_early_stop_ends_at_the_same_step_after_a_resume(copied):
    """A rate of nearly nothing: no evaluation is better than the first."""
    more = ("train.early_stop=2", "train.eval_every=2", "train.total_steps=40", "train.learning_rate=1e-12")
    summary = copied.stage("train", *options(1, *more))
    assert summary["steps"] == 6  # evaluated at 2, 4, 6: two without a better tau
    (Run(copied.run).draft("draft") / "draft.json").unlink()
    assert copied.stage("train", *options(1, *more))["steps"] == 6
