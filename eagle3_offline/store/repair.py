"""Drops what is bad in a dump, so that its units are dumped again; what is whole is not touched."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..records import UserError
from .format import MANIFEST, PART_JSON
from .part import read_part_json
from .places import LocalPlace, Place, place
from .verify import part_damage

STALE_HOURS = 24.0  # an unfinished part of another host is taken for abandoned after so long without a change


def repair(
    where: Place | Path | str, dry_run: bool = False, stale_hours: float = STALE_HOURS, scratch: Path | None = None
) -> dict[str, Any]:
    """Remove bad parts, what dead writers left, and a manifest that no longer holds. Verifies every byte.

    scratch: where parts for object storage are built. A part that cannot be read now, or that another release wrote, is no bad part:
    OSError or OtherVersion, and nothing is removed. Returns what was (or, with dry_run, would be) removed and why. Dump the units
    again and seal afterwards.
    """
    dump = place(where)
    parts = dump / "parts"
    names = parts.folders()
    if not names:
        raise UserError(f"{parts} holds no parts: nothing to repair; name another run or dump folder")
    bad, good, leftovers = {}, [], []
    for name in names:
        if name.startswith("."):
            leftovers += [parts / name] if abandoned(parts / name, stale_hours) else []
        elif (parts / name / PART_JSON).size() is None and not isinstance(dump, LocalPlace):
            leftovers += [parts / name] if _is_orphan(parts, name) else []
        elif problems := part_damage(parts / name):
            bad[name] = problems
        else:
            good.append(name)
    if scratch is not None:
        built = LocalPlace(scratch)
        leftovers += [built / name for name in built.folders() if abandoned(built / name, stale_hours)]
    if not dry_run:
        if bad and (dump / MANIFEST).size() is not None:
            (dump / MANIFEST).remove()  # first: a manifest must never name what is gone
        for folder in (*(parts / name for name in bad), *leftovers):
            folder.remove()
    return {"good": len(good), "dropped": bad, "leftovers": [folder.name for folder in leftovers], "dry_run": dry_run}


def abandoned(folder: Place, stale_hours: float) -> bool:
    """Whether the writer of an unfinished part (.unit-00042.HOST.PID.tmp) is gone."""
    if not isinstance(folder, LocalPlace):
        return False
    *_, pid, _ = folder.name.rsplit(".", 2)
    if pid.isdigit() and folder.name.removeprefix("." + folder.name.split(".")[1]) == f".{socket.gethostname()}.{pid}.tmp":
        return not _alive(int(pid))
    return time.time() - _newest(folder.path) > stale_hours * 3600


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _newest(folder: Path) -> float:
    """When anything in a folder changed last; its writer may rename it meanwhile."""
    times = []
    for parent, _, names in os.walk(folder):  # which bears folders that vanish
        for path in (Path(parent), *(Path(parent, name) for name in names)):
            with contextlib.suppress(FileNotFoundError):
                times.append(path.lstat().st_mtime)
    return max(times, default=time.time())


def _is_orphan(parts: Place, name: str) -> bool:
    """In object storage: arrays of an attempt (unit-00042.1a2b3c4d) that lost against a sealed one."""
    unit = name.partition(".")[0]
    try:
        return unit != name and read_part_json(parts / unit)["data"] != name
    except UserError:
        return False  # its unit is not sealed: it may still be on its way
