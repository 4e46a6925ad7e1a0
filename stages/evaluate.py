"""`eagle3-offline evaluate`: accept length on held-out rows."""

from __future__ import annotations

import click

from .common import run_stage, sections, with_recipe


@click.command("evaluate", **sections("evaluate"))
@with_recipe
def command(recipe, overrides, run_folder, as_json):
    """Walk the held-out answers as decoding would and print the accept length, beside the n-gram lookup's.

    With evaluate.decode_rows above 0, also decode that many held-out prompts with the exported draft and the target in fp32,
    speculatively and plainly.
    """

    def work(r, run, stop):
        from eagle3_offline import pipeline

        return pipeline.evaluate(run, r, stop)

    run_stage("evaluate", recipe, overrides, run_folder, as_json, work)
