"""Verifies a sealed dump against its own records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import UserError
from .files import problem
from .format import PART_JSON
from .part import read_part_json
from .reader import read_manifest


def verify(dump: Path, quick: bool = False) -> list[str]:
    """What is wrong with a dump, one line each; empty where all is well.

    Every file is compared with its recorded size and digest. `quick` digests only the JSON metadata, and compares sizes of the rest.
    """
    dump = Path(dump)
    try:
        manifest = read_manifest(dump)
    except UserError as error:
        return [str(error)]
    problems = _file_problems(dump, manifest["files"], quick)
    for entry in manifest["parts"]:
        problems += _part_problems(dump / "parts" / entry["name"], entry, quick)
    return problems


def _file_problems(folder: Path, files: Mapping[str, Any], quick: bool) -> list[str]:
    found = [problem(folder / name, record, sizes_only=quick and not name.endswith(".json")) for name, record in files.items()]
    return [text for text in found if text is not None]


def _part_problems(folder: Path, entry: Mapping[str, Any], quick: bool) -> list[str]:
    if text := problem(folder / PART_JSON, entry["part_json"]):
        return [text]
    files = read_part_json(folder)["files"]
    problems = _file_problems(folder, files, quick)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unlisted = sorted(there - set(files) - {PART_JSON})
    return problems + [f"{folder / name} is not listed in {PART_JSON}; nothing reads it: remove it" for name in unlisted]
