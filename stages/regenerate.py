"""`eagle3-offline regenerate`: the target answers every user turn."""

from __future__ import annotations

import click

from .common import parse_units, run_stage, sections, with_recipe, with_units


@click.command("regenerate", **sections("target", "regenerate"))
@with_recipe
@with_units
@click.option("--server", "servers", multiple=True, metavar="HOST:PORT", help="A running SGLang server to ask; repeatable.")
@click.option("--reasoning", type=click.Choice(["keep", "drop", "off"]), help="Short for --set regenerate.reasoning=...; see below.")
@click.option("--retry-errors", is_flag=True, help="Answer the rejected rows again that a retry can help.")
def command(recipe, overrides, run_folder, units, as_json, servers, reasoning, retry_errors):
    """Let the target answer every user turn anew and keep the engine's own token ids.

    Finished rows are kept, so a re-run goes on where it stopped. Rows that could not be answered go to errors/regenerate/.
    Without --server the recipe's engine answers: an SGLang that is started here, or transformers.

    A target that thinks gives each answer its thought, and the draft learns both. What later turns see of it must be what the server will
    show them, or the draft learns contexts that never come: the chat templates of most such targets (Qwen3, DeepSeek-R1, gpt-oss) leave
    earlier thoughts out, so take drop for them, or off where they are served without thinking. Then a turn whose prompt does not begin
    with the ids so far becomes a token row of its own, ID#0, ID#1, ...: history as the template renders it, unlearnt, and one answer.
    """
    if reasoning:
        overrides = (*overrides, f"regenerate.reasoning={reasoning}")

    def work(r, run, stop):
        from eagle3_offline import pipeline

        return pipeline.regenerate_units(run, r, parse_units(units), stop, servers, retry_errors)

    run_stage("regenerate", recipe, overrides, run_folder, as_json, work)
