"""`eagle3-offline store ...`: the dump on disk."""

from __future__ import annotations

from pathlib import Path

import click

from .common import finish, opened, run_stage, sections, with_recipe


@click.group("store")
def command():
    """Plan, seal, check, convert and look at a dump of hidden states."""


@command.command("estimate", **sections("dump"))
@with_recipe
@click.option("--rows", type=int, required=True, help="Conversations.")
@click.option("--row-tokens", type=float, default=600.0, show_default=True, help="Mean tokens of a conversation.")
@click.option("--supervised", type=float, default=0.6, show_default=True, help="Share of the tokens that the target generates.")
@click.option("--hidden-size", type=int, help="H of the target.  [default: from target.model, a local folder]")
@click.option("--vocab-size", type=int, default=128256, show_default=True, help="V of the target, where --hidden-size is given.")
@click.option("--layers", type=int, default=3, show_default=True, help="Captured layers.")
@click.option("--dtype", default="bfloat16", show_default=True, help="As the engine runs.")
@click.option("--rate", type=float, help="Prefill tokens per second of one engine, for the hours.")
@click.option("--engines", type=int, default=1, show_default=True, help="Engines that dump at the same time.")
def estimate(recipe, overrides, run_folder, as_json, **shape):
    """Estimate bytes, files and hours of a dump before anything runs."""

    def work():
        from eagle3_offline.pipeline import estimate_dump

        return estimate_dump(opened(recipe, overrides, run_folder)[0], **shape)

    finish("store estimate", as_json, work)


@command.command("plan")
@with_recipe
def plan(recipe, overrides, run_folder, as_json):
    """Show the work units of a run: the array tasks of every stage. Fixes them where tokens/unit-*.parquet came from elsewhere."""

    def work():
        from eagle3_offline.pipeline import plan_of_run

        return plan_of_run(opened(recipe, overrides, run_folder)[1])

    finish("store plan", as_json, work)


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

    def work():
        from eagle3_offline.pipeline import verify as check

        return check(opened(recipe, overrides, run_folder)[1], quick)

    finish("store verify", as_json, work)


@command.command("status")
@with_recipe
def status(recipe, overrides, run_folder, as_json):
    """Show which units are regenerated, dumped, in progress or missing."""

    def work():
        from eagle3_offline.pipeline import status as look

        return look(opened(recipe, overrides, run_folder)[1])

    finish("store status", as_json, work)


@command.command("info")
@with_recipe
def info(recipe, overrides, run_folder, as_json):
    """Show what a sealed dump holds: bytes per array beside their entropy bound, tokens, row lengths."""

    def work():
        from eagle3_offline.store.info import info as look

        return look(opened(recipe, overrides, run_folder)[1].dump)

    finish("store info", as_json, work)


@command.command("repair")
@with_recipe
@click.option("--dry-run", is_flag=True, help="Say what would be removed, remove nothing.")
@click.option("--stale-hours", type=float, default=24.0, show_default=True, help="Age at which another host's unfinished part is removed.")
def repair(recipe, overrides, run_folder, as_json, dry_run, stale_hours):
    """Drop bad parts and what dead writers left, so that `dump-hidden` does these units again. Reads every byte."""

    def work():
        from eagle3_offline.store.repair import repair as mend

        run = opened(recipe, overrides, run_folder)[1]
        return mend(run.dump, dry_run, stale_hours, run.folder / "sending")

    finish("store repair", as_json, work)


@command.command("merge")
@click.argument("dumps", nargs=-1, required=True)
@click.option("--into", type=click.Path(path_type=Path), required=True, help="New dump folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON line on stdout.")
def merge(dumps, into, as_json):
    """Join DUMPS (folders with a dump.json) of one target into a new one; files are linked where they lie on the same disk."""

    def work():
        from eagle3_offline.store.merge import merge as join

        return {"dump": str(into), **join(list(dumps), into)["counts"]}

    finish("store merge", as_json, work)


@command.command("degrade", **sections("dump"))
@with_recipe
@click.option("--into", required=True, help="New dump folder, or s3://BUCKET/PREFIX.")
def degrade(recipe, overrides, run_folder, as_json, into):
    """Make a lossy or compact dump from a lossless one, without the target: mode and codecs as in the recipe's dump section."""

    def work(r, run, stop):
        from eagle3_offline.capture.degrade import degrade as convert

        return convert(run.dump, into, r.dump, stop)

    run_stage("store degrade", recipe, overrides, run_folder, as_json, work)


@command.command("import", **sections("target", "dump"))
@with_recipe
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--masks", type=click.Path(path_type=Path), help="speculators: the data set folder with input_ids and loss_mask.")
@click.option("--trust-ckpt", is_flag=True, help="SpecForge: read .ckpt files, which are pickles (with weights_only).")
def import_(recipe, overrides, run_folder, as_json, folder, masks, trust_ckpt):
    """Make a dump of samples in FOLDER that SpecForge (.ckpt, .ckpt.gz) or speculators (hs_*.safetensors) wrote.

    target.model names their target, target.layers the boundaries that they hold, low to high.
    """

    def work(r, run, stop):
        from eagle3_offline.pipeline import import_dump

        return import_dump(run, r, folder, masks, trust_ckpt, stop)

    run_stage("store import", recipe, overrides, run_folder, as_json, work, new=True)
