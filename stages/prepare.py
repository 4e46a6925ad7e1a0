"""`eagle3-offline prepare`: raw data to conversations in work units."""

from __future__ import annotations

import click

from .common import run_stage, sections, with_recipe


@click.command("prepare", **sections("prepare"))
@with_recipe
def command(recipe, overrides, run_folder, as_json):
    """Read conversations, hold out a share, cut the rest into work units, write the plan.

    Rows that are no conversation go to errors/prepare/ with file, line and reason; the others go on.
    """

    def work(r, run, stop):
        from eagle3_offline.conversations.prepare import prepare

        return prepare(run, r.prepare, r.max_rejected)

    run_stage("prepare", recipe, overrides, run_folder, as_json, work, new=True)
