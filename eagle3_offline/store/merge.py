"""Joins two or more dumps of one target into a new one: the parts are copied (linked, where they lie on one disk) and renumbered."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..records import UserError
from ..runs import atomic_folder, fsync_path, unit_name
from .files import write_bytes
from .format import PART_JSON, TARGET, DumpSpec, check_same_spec, json_bytes, with_digest
from .part import data_folder, read_part_json
from .places import LocalPlace, Place
from .reader import Dump
from .seal import PlannedUnit, seal
from .target_files import INDEX, read_index
from .verify import verify


def merge(sources: list[Path | str], into: Path) -> dict[str, Any]:
    """Write the rows of `sources` as one sealed dump into the new folder `into`; return its manifest.

    They must agree in target, layers, dtype, codecs and mode; system prompts and sampling may differ, and the manifest keeps them all.
    """
    if (into / "dump.json").exists():
        raise UserError(f"{into} holds a dump already: name a new folder")
    for source in sources:
        if problems := verify(source):
            raise UserError(f"{source} is damaged, nothing was merged:\n" + "\n".join(problems))
    dumps = [Dump.open(source) for source in sources]
    spec = _common_spec(dumps)
    _copy_target(dumps, into)
    units: list[PlannedUnit] = []
    for dump in dumps:
        for entry, (_, split, rows) in zip(dump.manifest["parts"], planned_units(dump), strict=True):
            _copy_part(dump.where / "parts" / entry["name"], into, len(units), spec)
            units.append((len(units), split, rows))
    return seal(into, spec, units, missing=[name for dump in dumps for name in dump.manifest["missing"]["rows"]])


def planned_units(dump: Dump) -> list[PlannedUnit]:
    """What the parts of a dump hold, as a plan: rows in the dump's order, which training follows, then the rejected ones."""
    units = []
    for number, entry in enumerate(dump.manifest["parts"]):
        content = read_part_json(dump.where / "parts" / entry["name"], entry["part_json"])
        rows = [dump.ids(i) for i in np.flatnonzero(dump.parts == number).tolist()]
        units.append((content["unit"], content["split"], (*rows, *(reject["id"] for reject in content["rejects"]))))
    return units


def _common_spec(dumps: list[Dump]) -> DumpSpec:
    first = dumps[0].spec
    for dump in dumps[1:]:
        same = replace(dump.spec, conversation=first.conversation, max_length=first.max_length)
        check_same_spec(same.to_dict(), first.to_dict(), dump.where)
        if read_index(dump.where) != read_index(dumps[0].where):
            raise UserError(f"{dump.where / TARGET} differs from {dumps[0].where / TARGET}: dumps of different targets cannot be merged")
    conversations = [dump.spec.conversation for dump in dumps]
    distinct = [value for number, value in enumerate(conversations) if value not in conversations[:number]]
    conversation = distinct[0] if len(distinct) == 1 else {"merged": distinct}
    return replace(first, conversation=conversation, max_length=max(dump.spec.max_length for dump in dumps))


def _copy_target(dumps: list[Dump], into: Path) -> None:
    if (into / TARGET).is_dir():
        return
    with atomic_folder(into / TARGET, modes=False) as temporary:
        for name in (*read_index(dumps[0].where), INDEX):
            _copy(dumps[0].where / TARGET / name, temporary / name)


def _copy_part(folder: Place, into: Path, unit: int, spec: DumpSpec) -> None:
    """Copy a part under a new number. A part that an interrupted merge has copied already is kept."""
    content = read_part_json(folder)
    data = data_folder(folder, content)
    content.pop("digest")
    content = with_digest({**content, "unit": unit, "spec": spec.to_dict(), "data": None})
    target = into / "parts" / unit_name(unit)
    if not target.is_dir():
        with atomic_folder(target, modes=False) as temporary:  # linked files keep theirs
            for name in content["files"]:
                (temporary / name).parent.mkdir(exist_ok=True)
                _copy(data / name, temporary / name)
            write_bytes(temporary / PART_JSON, json_bytes(content))


def _copy(source: Place, target: Path) -> None:
    """A hard link where that can be: sealed files are never changed."""
    if isinstance(source, LocalPlace):
        try:
            os.link(source.path, target)
        except OSError:
            shutil.copyfile(source.path, target)
            fsync_path(target)
    else:
        write_bytes(target, source.read())
