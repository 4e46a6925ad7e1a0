"""Micro-batches packed by tokens, blockwise attention and activations made again: less memory, the same losses and weights."""

import shutil

import numpy as np
import pytest
import torch

from eagle3_offline.config import load_recipe
from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump
from eagle3_offline.training.data import micro_batches, open_source

from ..small_runs import Cli, losses, weights

SPARING = ("train.attention=blockwise", "train.checkpoint_activations=true")


@pytest.fixture(scope="module")
def whole(dumped, tmp_path_factory) -> Cli:
    """An uninterrupted training of 8 steps of 4 rows, 2 at a time, on one rank."""
    cli = dumped.copy(tmp_path_factory.mktemp("whole") / "run")
    cli.stage("train", *options())
    return cli


@pytest.fixture(scope="module")
def packed(dumped) -> str:
    """A budget that two rows of the mean length fill: two do not always fit."""
    lengths = Dump.open(Run(dumped.run).dump).lengths
    return f"train.micro_batch_tokens={int(2 * lengths.mean())}"


def options(*more: str) -> list[str]:
    return [word for setting in ("train.total_steps=8", "train.eval_every=0", *more) for word in ("--set", setting)]


def test_the_packs_of_a_step_vary(dumped, packed):
    """Else the trainings below would say nothing."""
    config = load_recipe(str(dumped.recipe), (packed,)).train
    source = open_source(Run(dumped.run).dump, config)
    counts = {len(micro_batches(source, config, 0, 1, step)) for step in range(8)}
    sizes = {len(rows) for step in range(8) for rows in micro_batches(source, config, 0, 1, step)}
    assert len(counts) > 1 and len(sizes) > 1, (counts, sizes)
    assert sorted(np.concatenate(micro_batches(source, config, 0, 1, 3))) == sorted(
        np.concatenate([rows for rank in range(2) for rows in micro_batches(source, config, rank, 2, 3)])
    )


def assert_same(cli: Cli, whole: Cli, tolerance: float) -> None:
    assert losses(cli) == pytest.approx(losses(whole), rel=tolerance)
    ours, theirs = weights(cli), weights(whole)
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in theirs)


def test_a_packed_training_is_the_same_and_resumes_exactly(whole, copied, packed):
    more = options(packed, "train.checkpoint_every=5")
    copied.stage("train", *more)
    assert_same(copied, whole, 1e-6)
    folder, once = Run(copied.run).draft("draft"), losses(copied)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    (folder / "draft.json").unlink()
    copied.stage("train", *more)
    assert losses(copied) == once


def test_blocks_and_activations_made_again(whole, copied):
    copied.stage("train", *options(*SPARING))
    assert_same(copied, whole, 1e-6)


def test_all_of_it_on_two_ranks_at_zero_3(whole, copied, packed):
    copied.on_ranks(2, "train", *options(packed, *SPARING, "train.deepspeed=zero3"))
    assert_same(copied, whole, 1e-5)
