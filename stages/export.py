"""`eagle3-offline export`: a trained draft as a folder that an inference engine loads."""

from __future__ import annotations

import click

from .common import run_stage, sections, with_recipe


@click.command("export", **sections("export"))
@with_recipe
@click.option("--to", type=click.Choice(["sglang", "vllm", "hf"]), help="Short for --set export.to=NAME.")
@click.option("--check", is_flag=True, help="Write nothing: compare the export that is there with the trained draft and the dump.")
def command(recipe, overrides, run_folder, to, check, as_json):
    """Write drafts/DRAFT/export: config.json, model.safetensors, a model card and the target's tokenizer, and load it back."""
    overrides = (*overrides, f"export.to={to}") if to else overrides

    def work(r, run, stop):
        from eagle3_offline import pipeline

        return pipeline.check_export(run, r) if check else pipeline.export_draft(run, r)

    run_stage("export", recipe, overrides, run_folder, as_json, work)
