"""The run folder: names, atomic writes, provenance, the plan of work units, rejects, and what each stage was made with."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .records import SPLITS, Reject, Stopped, TooManyRejected, UserError

EXIT_FAULT, EXIT_USAGE, EXIT_REJECTED, EXIT_STOPPED = 1, 2, 3, 85

PLAN_VERSION = 1


def unit_name(unit: int) -> str:
    """The name that a unit has in every folder of a run."""
    return f"unit-{unit:05d}"


def digest(value: Any) -> str:
    """A short, stable digest of plain JSON values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; it becomes `path`, whole and on disk, only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, modes: bool = True) -> Iterator[Path]:
    """A temporary folder beside `folder`; it becomes `folder`, whole and on disk, only when the block ends without an error.

    Where another process published the same folder meanwhile, that one is kept. modes: make what it holds readable for all.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a dead process with our host and pid
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if modes:
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes private files
            fsync_path(path)
        fsync_path(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); it is written whole, so it was changed or damaged: remove it and re-run its stage"
        ) from None


def append_jsonl(path: Path, value: Any) -> None:
    """Add a line to a file that `continue_jsonl` opened."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(value, ensure_ascii=False) + "\n")


def continue_jsonl(path: Path, keep: Callable[[Any], bool] = lambda _: True) -> list[Any]:
    """The values of a file that is appended to, those that `keep` accepts; the file is rewritten with these alone.

    A last line without its end was torn by a kill and is dropped.
    """
    if not path.is_file():
        return []
    values = [value for line in _whole_lines(path) if keep(value := json.loads(line))]
    write_jsonl(path, values)
    return values


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    """Lines that end with a newline; str.splitlines would also cut at U+2028 and others, which JSON leaves inside a string."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True, slots=True)
class Unit:
    """One work unit: rows of one split that go through every stage together."""

    unit: int
    split: str
    rows: tuple[str, ...]

    @property
    def name(self) -> str:
        return unit_name(self.unit)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work units of a run and the limits that they were made with. Written once, never rewritten."""

    units: tuple[Unit, ...]
    limits: dict[str, Any]

    def select(self, numbers: Iterable[int] | None) -> list[Unit]:
        """The units of these numbers; all for None."""
        if numbers is None:
            return list(self.units)
        chosen = sorted(set(numbers))
        if unknown := [n for n in chosen if not 0 <= n < len(self.units)]:
            raise UserError(f"units {unknown} do not exist: the plan has units 0 to {len(self.units) - 1}")
        return [self.units[n] for n in chosen]

    def needed(self, answer_tokens: Callable[[Unit], int | None]) -> list[Unit]:
        """Units that the run needs: all, or with an `answer_tokens` limit the train units up to the one that reaches it.

        `answer_tokens(unit)` is the number of tokens that the unit's answers have, None while it is not regenerated.
        Units beyond the limit are spare: never asked, no gap.
        """
        limit = self.limits.get("answer_tokens")
        needed, total = [], 0
        for unit in self.units:
            if unit.split == "train" and limit is not None:
                if total >= limit:
                    continue
                total += answer_tokens(unit) or 0
            needed.append(unit)
        return needed


def parse_units(text: str | None) -> list[int] | None:
    """`3,7-9` -> [3, 7, 8, 9]; None stays None (all units)."""
    if text is None:
        return None
    numbers: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--units {text}: {piece!r} is no unit; expected numbers and ranges such as 3,7-9")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


class Run:
    """Paths of a run folder, and the few files that every stage shares."""

    def __init__(self, folder: Path | str, dump: str | None = None):
        """dump: where the dump lies, if not in the run folder."""
        self.folder = Path(folder)
        self.dump: Path | str = dump or self.folder / "dump"

    def conversations(self, unit: int) -> Path:
        return self.folder / "conversations" / f"{unit_name(unit)}.jsonl"

    def tokens(self, unit: int) -> Path:
        return self.folder / "tokens" / f"{unit_name(unit)}.parquet"

    def regenerated(self, unit: int) -> Path:
        return self.folder / "regenerated" / f"{unit_name(unit)}.jsonl"

    def errors(self, stage: str, unit: int | None = None) -> Path:
        """Rejects of a stage: of one unit, or (prepare) of the inputs, before rows have a unit."""
        return self.folder / "errors" / stage / (f"{unit_name(unit)}.jsonl" if unit is not None else "input.jsonl")

    def draft(self, name: str) -> Path:
        return self.folder / "drafts" / name

    # -- plan

    @property
    def plan_path(self) -> Path:
        return self.folder / "plan.json"

    def write_plan(self, plan: Plan) -> None:
        units = [{"unit": unit.unit, "split": unit.split, "rows": list(unit.rows)} for unit in plan.units]
        write_json(self.plan_path, {"version": PLAN_VERSION, "limits": plan.limits, "units": units})

    def read_plan(self) -> Plan:
        if not self.plan_path.is_file():
            raise UserError(f"{self.plan_path} does not exist: run `eagle3-offline prepare --run {self.folder}` first")
        value = read_json(self.plan_path)
        if value.get("version") != PLAN_VERSION:
            raise UserError(f"{self.plan_path} has version {value.get('version')}; this program reads version {PLAN_VERSION}")
        units = tuple(Unit(u["unit"], u["split"], tuple(u["rows"])) for u in value["units"])
        for number, unit in enumerate(units):
            if unit.unit != number or unit.split not in SPLITS:
                raise UserError(
                    f"{self.plan_path}: entry {number} is unit {unit.unit} of split {unit.split!r}; "
                    "expected units in order, of split train or eval"
                )
        return Plan(units, value["limits"])

    # -- rejects

    def write_rejects(self, stage: str, unit: int | None, rejects: list[Reject]) -> None:
        """Replace the unit's list of rejects; no file where there are none."""
        path = self.errors(stage, unit)
        if rejects:
            write_jsonl(path, (asdict(reject) for reject in rejects))
        else:
            path.unlink(missing_ok=True)

    def read_rejects(self, stage: str, unit: int | None) -> list[Reject]:
        path = self.errors(stage, unit)
        return [Reject(**value) for value in read_jsonl(path)] if path.is_file() else []

    # -- provenance and settings

    def record(self, stage: str, recipe_yaml: str) -> None:
        """Write the resolved recipe and append who runs what, where and with which versions, before the stage works."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():  # array tasks start together
            write_text(self.folder / "recipe.yaml", recipe_yaml)
            path = self.folder / "provenance.json"
            entries = read_json(path) if path.is_file() else []
            write_json(path, [*entries, {"stage": stage, **_provenance()}])

    def claim(self, stage: str, settings: dict[str, Any]) -> str:
        """Bind the stage's outputs in this folder to `settings` (plain JSON values); return their digest.

        Raises SettingsChanged when outputs made with other settings are there already: never mix two runs in one folder.
        """
        path = self._settings(stage)
        with self._lock():
            if path.is_file():
                if (found := read_json(path)) != json.loads(json.dumps(settings)):
                    raise SettingsChanged(self.folder, stage, found, settings)
            else:
                write_json(path, settings)
        return digest(settings)

    def claimed(self, stage: str) -> dict[str, Any]:
        """The settings that a stage's outputs were made with. Raises NotClaimed where the stage has none here."""
        path = self._settings(stage)
        if not path.is_file():
            raise NotClaimed(f"{self.folder} has no outputs of the stage {stage} yet: run it first")
        return read_json(path)

    def discard(self, stage: str, *outputs: Path) -> None:
        """Remove a stage's outputs, its rejects and the settings they were made with."""
        for path in (*outputs, self.folder / "errors" / stage):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._settings(stage).unlink(missing_ok=True)

    def _settings(self, stage: str) -> Path:
        return self.folder / "settings" / f"{stage}.json"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


class NotClaimed(UserError):
    """A run folder has no outputs of a stage."""


class SettingsChanged(UserError):
    """A run folder holds outputs that were made with other settings."""

    def __init__(self, folder: Path, stage: str, found: dict[str, Any], wanted: dict[str, Any]):
        self.stage = stage
        keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        changes = "; ".join(f"{key} was {found.get(key)!r}, is now {wanted.get(key)!r}" for key in keys)
        super().__init__(f"{folder} holds outputs of {stage} made with other settings: {changes}. Use another --run, or remove the folder")


def _provenance() -> dict[str, Any]:
    versions = {}
    for name in ("eagle3-offline", "torch", "deepspeed", "transformers", "zarr", "numcodecs", "datasets", "sglang"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    here = Path(__file__).parent
    commit = (
        subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if shutil.which("git")
        else None
    )
    return {
        "argv": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None if commit else None,
    }


def check_rejected(stage: str, done: int, rejected: int, limit: float, errors: Path) -> None:
    """Raise TooManyRejected when more than `limit` of the stage's rows were rejected."""
    total = done + rejected
    if total and rejected > limit * total:
        raise TooManyRejected(
            f"{stage}: {rejected} of {total} rows were rejected, {rejected / total:.1%}, more than max_rejected = {limit:.1%}. "
            f"Reasons are in {errors}. Mend the rows, or allow more with --set max_rejected={min(1.0, rejected / total + 0.01):.2f}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 (Slurm's warning) or SIGINT until the stage reaches a point where it can stop."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.received = number

    def check(self) -> None:
        """Raise Stopped when a signal has come."""
        if self.received is not None:
            raise Stopped(f"stopped by {signal.Signals(self.received).name}; what is finished is kept, run the same command again to go on")
