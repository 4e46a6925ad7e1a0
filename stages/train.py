"""`eagle3-offline train`: a draft, purely from the dump."""

from __future__ import annotations

import os

import click

from .common import run_stage, sections, stage_words, with_recipe


@click.command("train", **sections("train", "tracking"))
@with_recipe
@click.option("--nproc", type=int, default=1, show_default=True, help="Ranks to start on this node, one for each of its GPUs.")
def command(recipe, overrides, run_folder, as_json, nproc):
    """Train a draft head with DeepSpeed ZeRO from a sealed dump; the target is not opened.

    Goes on from the newest checkpoint. SIGTERM or SIGUSR1: a checkpoint at the next step, then exit code 85.
    Several ranks: --nproc on one node; srun, torchrun or the deepspeed launcher on one or many (torchrun turns 85 into 1).
    """

    def work(r, run, stop):
        from eagle3_offline.training.launch import launch, refuse_nested

        refuse_nested(nproc, os.environ)
        if nproc > 1:
            words = stage_words("train", recipe, overrides, run_folder)
            return launch(nproc, words, run.folder / "logs" / f"train-{r.train.draft}", stop)
        from eagle3_offline.training.loop import train

        return train(run, r, stop)

    run_stage("train", recipe, overrides, run_folder, as_json, work)
