"""The command line: `eagle3-offline STAGE`."""

from __future__ import annotations

import click

from eagle3_offline import __version__

from . import demo, doctor, dump_hidden, evaluate, export, prepare, regenerate, serve, store, train

FLOW = """\b
prepare -> regenerate -> dump-hidden -> store seal -> train -> export, evaluate
Phase one opens the target; phase two trains purely from the dump."""


@click.group(help=f"Train EAGLE-3 draft models for speculative decoding, offline.\n\n{FLOW}")
@click.version_option(__version__)
def main() -> None:
    pass


for stage in (demo, doctor, serve, prepare, regenerate, dump_hidden, store, train, export, evaluate):
    main.add_command(stage.command)
