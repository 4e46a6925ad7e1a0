"""`eagle3-offline export`: a trained draft as a folder that an inference engine loads."""

from __future__ import annotations

import click

from .common import run_stage, sections, with_recipe


@click.command("export", **sections("export"))
@with_recipe
def command(recipe, overrides, run_folder, as_json):
    """Write drafts/DRAFT/export: config.json, model.safetensors and the target's tokenizer, and load it back."""

    def work(r, run, stop):
        from eagle3_offline.pipeline import export_draft

        return export_draft(run, r)

    run_stage("export", recipe, overrides, run_folder, as_json, work)
