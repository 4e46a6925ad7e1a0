"""What every stage command shares: its options, its exit codes, and its last line."""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from eagle3_offline.config import Recipe, load_recipe, section_help, to_yaml
from eagle3_offline.records import CheckFailed, EngineFailed, RankFailed, Stopped, Summary, TooManyRejected, UserError
from eagle3_offline.runs import EXIT_FAULT, EXIT_REJECTED, EXIT_STOPPED, EXIT_USAGE, Run, StopSignal, parse_units

# They say what is wrong: a full or read-only disk, storage that fails or does not answer. A traceback would bury it.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
EXIT_HELP = "Exit codes: 0 done; 2 usage or configuration; 3 too many rows rejected; 85 stopped by a signal, run again to go on."


def with_recipe(command: Callable) -> Callable:
    """Options that name a run: --recipe, --set, --run, --json."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON line on stdout."),
        click.option("--run", "run_folder", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME of the recipe]"),
        click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the recipe; repeatable."),
        click.option("--recipe", metavar="FILE|NAME", help="Recipe: a YAML file, or the name of one in configs/.  [default: the defaults]"),
    ):
        command = option(command)
    return command


def stage_words(stage: str, recipe: str | None, overrides: tuple[str, ...], run_folder: Path | None) -> list[str]:
    """The words of a stage's command line, for another process to run it."""
    options = {"--recipe": recipe, "--run": run_folder}
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return [stage, *words, *(word for override in overrides for word in ("--set", override))]


def with_units(command: Callable) -> Callable:
    """The option --units."""
    return click.option("--units", metavar="LIST", help="Work units to do, such as 3,7-9.  [default: all]")(command)


def sections(*names: str) -> dict[str, str]:
    """Help text of a stage: the recipe keys that it reads, for click.command(**sections(...))."""
    keys = "\n\n".join("\b\n" + section_help(name) for name in names)
    return {"epilog": f"Recipe keys (set them in the recipe or with --set):\n\n{keys}\n\n{EXIT_HELP}"}


def opened(recipe: str | None, overrides: tuple[str, ...], run_folder: Path | None) -> tuple[Recipe, Run]:
    """The resolved recipe and its run folder."""
    resolved = load_recipe(recipe, overrides)
    return resolved, Run(run_folder or Path("runs") / resolved.name, resolved.dump.location)


def finish(stage: str, as_json: bool, work: Callable[[], Summary]) -> None:
    """Run a stage's work, print its summary, and turn what went wrong into its exit code."""
    try:
        summary = work()
    except UserError as error:
        _leave(stage, error, EXIT_USAGE)
    except TooManyRejected as error:
        _leave(stage, error, EXIT_REJECTED)
    except (CheckFailed, EngineFailed, RankFailed) as error:
        _leave(stage, error, EXIT_FAULT)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _leave(stage, error, EXIT_FAULT)
    except Stopped as error:
        _leave(stage, error, EXIT_STOPPED)
    else:
        click.echo(json.dumps({"stage": stage, **summary}) if as_json else f"{stage}: " + describe(summary))


def run_stage(
    stage: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    run_folder: Path | None,
    as_json: bool,
    work: Callable[[Recipe, Run, StopSignal], Summary],
    new: bool = False,
) -> None:
    """Resolve the recipe, record it in the run folder (which `new` may make), then work.

    Signals are caught from here on: `work` imports what is slow to import itself, so that an early one is not lost.
    """

    def recorded() -> Summary:
        resolved, run = opened(recipe, overrides, run_folder)
        if not new and not run.folder.is_dir():
            raise UserError(f"the run folder {run.folder} does not exist: run `prepare` first, or name another with --run")
        run.record(stage, to_yaml(resolved))
        return work(resolved, run, stop)

    with StopSignal() as stop:
        finish(stage, as_json, recorded)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's warning to a stage that is done


def describe(summary: dict[str, Any]) -> str:
    """A summary for people, on one line."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.4g}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        if isinstance(value, list):
            return "[" + ", ".join(text(item) for item in value[:8]) + (", ...]" if len(value) > 8 else "]")
        return str(value)

    return ", ".join(f"{key} {text(value)}" for key, value in summary.items())


def _leave(stage: str, error: Exception, code: int) -> None:
    click.echo(f"{stage}: {error}", err=True)
    sys.exit(code)


__all__ = ["finish", "opened", "parse_units", "run_stage", "sections", "stage_words", "with_recipe", "with_units"]
