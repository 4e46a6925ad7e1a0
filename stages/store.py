"""`eagle3-offline store ...`: the dump on disk."""

from __future__ import annotations

import click

from .common import finish, opened, run_stage, with_recipe


@click.group("store")
def command():
    """Seal, check and look at a dump of hidden states."""


@command.command("seal")
@with_recipe
@click.option("--allow-partial", is_flag=True, help="Seal although rows are missing; the manifest names them.")
def seal(recipe, overrides, run_folder, as_json, allow_partial):
    """Join the parts of all units into one dump: write its row table, statistics and manifest."""

    def work(r, run, _stop):
        from eagle3_offline import pipeline

        return pipeline.seal(run, r, allow_partial)

    run_stage("store seal", recipe, overrides, run_folder, as_json, work)


@command.command("verify")
@with_recipe
@click.option("--quick", is_flag=True, help="Sizes and the digests of metadata only.")
def verify(recipe, overrides, run_folder, as_json, quick):
    """Check every byte of a dump against its digests. Exit code 2 where something is wrong."""
    from eagle3_offline.pipeline import verify as work

    finish("store verify", as_json, lambda: work(opened(recipe, overrides, run_folder)[1], quick))


@command.command("status")
@with_recipe
def status(recipe, overrides, run_folder, as_json):
    """Show which units are regenerated and which are dumped."""
    from eagle3_offline.pipeline import status as work

    finish("store status", as_json, lambda: work(opened(recipe, overrides, run_folder)[1]))
