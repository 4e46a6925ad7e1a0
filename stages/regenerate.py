"""`eagle3-offline regenerate`: the target answers every user turn."""

from __future__ import annotations

import click

from .common import parse_units, run_stage, sections, with_recipe, with_units


@click.command("regenerate", **sections("target", "regenerate"))
@with_recipe
@with_units
def command(recipe, overrides, run_folder, units, as_json):
    """Let the target answer every user turn anew and keep the engine's own token ids.

    Finished units are skipped, so a re-run goes on where it stopped. Rows that could not be answered go to errors/regenerate/.
    """

    def work(r, run, stop):
        from eagle3_offline import pipeline

        return pipeline.regenerate_units(run, r, parse_units(units), stop)

    run_stage("regenerate", recipe, overrides, run_folder, as_json, work)
