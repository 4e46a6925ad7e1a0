"""Drops what is bad in a dump, so that its units are dumped again; what is whole is not touched."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..records import UserError
from .format import MANIFEST, PART_JSON
from .part import read_part_json
from .places import LocalPlace, Place, place
from .verify import part_problems

STALE_HOURS = 24.0  # an unfinished part of another host is taken for abandoned after so long without a change


def repair(where: Place | Path | str, dry_run: bool = False, stale_hours: float = STALE_HOURS) -> dict[str, Any]:
    """Remove bad parts, what was left unfinished by dead writers, and a manifest that no longer holds. Verifies every byte.

    Returns what was (or, with dry_run, would be) removed and why. Dump the units again and seal afterwards.
    """
    dump = place(where)
    parts = dump / "parts"
    names = parts.folders()
    if not names:
        raise UserError(f"{parts} holds no parts: nothing to repair; name another run or dump folder")
    bad, good, leftovers = {}, [], []
    for name in names:
        if name.startswith("."):
            leftovers += [name] if abandoned(parts / name, stale_hours) else []
        elif (parts / name / PART_JSON).size() is None and not isinstance(dump, LocalPlace):
            leftovers += [name] if _is_orphan(parts, name) else []
        elif problems := part_problems(parts / name):
            bad[name] = problems
        else:
            good.append(name)
    if not dry_run:
        for name in (*bad, *leftovers):
            (parts / name).remove()
        if bad and (dump / MANIFEST).size() is not None:
            (dump / MANIFEST).remove()
    return {"good": len(good), "dropped": bad, "leftovers": leftovers, "dry_run": dry_run}


def abandoned(folder: Place, stale_hours: float) -> bool:
    """Whether the writer of an unfinished part (.unit-00042.HOST.PID.tmp) is gone."""
    if not isinstance(folder, LocalPlace):
        return False
    pieces = folder.name.rsplit(".", 2)
    if socket.gethostname() in folder.name and pieces[-2].isdigit():
        return not _alive(int(pieces[-2]))
    try:
        return time.time() - _newest(folder.path.rglob("*"), folder.path) > stale_hours * 3600
    except FileNotFoundError:
        return False  # it was published, or its files are being removed: someone is at it


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _newest(files: Iterable[Path], folder: Path) -> float:
    return max((file.lstat().st_mtime for file in (folder, *files)), default=0.0)


def _is_orphan(parts: Place, name: str) -> bool:
    """In object storage: arrays of an attempt (unit-00042.1a2b3c4d) that lost against a sealed one."""
    unit = name.partition(".")[0]
    try:
        return unit != name and read_part_json(parts / unit)["data"] != name
    except UserError:
        return False  # its unit is not sealed: it may still be on its way
