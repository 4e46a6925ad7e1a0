"""`eagle3-offline demo`: the whole job on a real model and real input."""

from __future__ import annotations

import click

from .common import run_stage, with_recipe


@click.command("demo")
@with_recipe
@click.option(
    "--target",
    type=click.Choice(["smollm2", "tiny"]),
    default="smollm2",
    show_default=True,
    help="tiny: trained here in two minutes; proves plumbing only.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "sglang", "transformers"]),
    help="What runs the target; the same as --set target.engine=...  [default: the recipe's]",
)
def command(recipe, overrides, run_folder, as_json, target, engine):
    """Run every stage on this machine: a real target, real questions, a draft that speeds it up, and a report.

    A second run redoes only what changed; a demo that was killed goes on where it stopped. The page is runs/demo/report.html.
    """

    def work(r, run, stop):
        from eagle3_offline import pipeline

        return pipeline.demo(run, r, stop)

    name = recipe or ("demo" if target == "smollm2" else "demo-tiny")
    overrides = (*overrides, f"target.engine={engine}") if engine else overrides
    run_stage("demo", name, overrides, run_folder, as_json, work, new=True)
