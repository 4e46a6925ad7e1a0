"""`eagle3-offline doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import sys

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON line on stdout.")
def command(as_json):
    """Print versions and devices, and what is missing. Exit code 0 when every stage can run here, 2 otherwise."""
    from eagle3_offline.doctor import examine, render

    findings = examine()
    click.echo(render(findings, as_json))
    sys.exit(0 if findings["ready"] else 2)
