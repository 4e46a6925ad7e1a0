"""The array scripts: clean, and every stage command in them is one that click knows."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
from eagle3_offline.stages.cli import main

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def test_shellcheck(require):
    require("shellcheck", shutil.which("shellcheck") is not None, "no shellcheck here")
    done = subprocess.run(["shellcheck", *SCRIPTS, ROOT / ".ci" / "run", ROOT / "tests/slurm/sandbox.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def stage_commands(text: str) -> list[list[str]]:
    """The words behind `eagle3-offline` of each command, shell variables replaced by 7."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        if "eagle3-offline " in line and not line.lstrip().startswith("#"):
            line = line.replace(' "$@"', "")  # options that the user adds
            plain = re.sub(r'"?\$\{?\w+(:[^}]*)?\}?"?', "7", line.split("eagle3-offline ", 1)[1])
            commands.append(shlex.split(plain))
    return commands


def parse(words: list[str]) -> None:
    """Parse as the command line does, without running anything."""
    command, context = main, click.Context(main)
    while isinstance(command, click.Group):
        command = command.get_command(context, words[0])
        if command is None:
            raise click.UsageError(f"no command {words[0]}")
        words = words[1:]
    command.make_context("test", list(words))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_stage_command_is_a_real_one(script):
    commands = stage_commands(script.read_text())
    assert len(commands) == 1
    parse(commands[0])


def test_the_readmes_commands_are_real():
    commands = stage_commands((ROOT / "README.md").read_text())
    assert len(commands) >= 8
    for words in commands:
        words = words[: words.index("#")] if "#" in words else words
        if words[0].isupper():
            continue  # STAGE --help
        parse([word.rstrip("`,;:") for word in words if not word.startswith("`")])


@pytest.mark.parametrize("words", [["dump-hiden"], ["dump-hidden", "--unit", "7"], ["store", "seal", "extra"]])
def test_the_parser_above_sees_mistakes(words):
    with pytest.raises(click.UsageError):
        parse(words)
