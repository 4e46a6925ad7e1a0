"""`eagle3-offline train`: a draft, purely from the dump."""

from __future__ import annotations

import click

from .common import run_stage, sections, with_recipe


@click.command("train", **sections("train"))
@with_recipe
def command(recipe, overrides, run_folder, as_json):
    """Train a draft head with DeepSpeed ZeRO from a sealed dump; the target is not opened.

    Goes on from the newest checkpoint. SIGTERM or SIGUSR1: a checkpoint at the next step, then exit code 85.
    Several ranks: start it with torchrun, the deepspeed launcher or srun.
    """

    def work(r, run, stop):
        from eagle3_offline.training.loop import train

        return train(run, r, stop)

    run_stage("train", recipe, overrides, run_folder, as_json, work)
