"""`eagle3-offline serve`: SGLang servers of the target, for `regenerate --server` or for trying a draft."""

from __future__ import annotations

import click

from .common import run_stage, sections, with_recipe


@click.command("serve", **sections("target"))
@with_recipe
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind; 0.0.0.0 lets other machines in.")
@click.option("--port", default=30000, show_default=True, help="Port of the first server; the next one has the next.")
@click.option("--gpus-per-server", default=1, show_default=True, help="GPUs of each server; say -- --tp-size N as well.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def command(recipe, overrides, run_folder, as_json, host, port, gpus_per_server, more):
    """Start one SGLang server per GPU (one on a machine without), wait until they are up, and serve until a signal comes.

    What follows -- goes to SGLang untouched: eagle3-offline serve --recipe R -- --tp-size 2 --mem-fraction-static 0.8

    Logs are RUN/logs/server-N.log.
    """

    def work(r, run, stop):
        from eagle3_offline import pipeline

        return pipeline.serve_target(run, r, more, stop, click.echo, host=host, port=port, gpus_per_server=gpus_per_server)

    run_stage("serve", recipe, overrides, run_folder, as_json, work, new=True)
