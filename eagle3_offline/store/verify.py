"""Verifies a sealed dump against its own records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import UserError
from .files import problem, size_problem
from .format import PART_JSON
from .part import data_folder, read_part_json
from .places import Place, place
from .reader import read_manifest


def verify(dump: Place | Path | str, quick: bool = False) -> list[str]:
    """What is wrong with a dump, one line each, the rows concerned named; empty where all is well.

    Every file is compared with its recorded size and digest. `quick` digests only the JSON metadata, and compares sizes of the rest.
    """
    dump = place(dump)
    try:
        manifest = read_manifest(dump)
    except (UserError, OSError) as error:
        return [str(error)]
    problems = _file_problems(dump, manifest["files"], {name: (dump / name).size() for name in manifest["files"]}, quick)
    for entry in manifest["parts"]:
        problems += part_problems(dump / "parts" / entry["name"], entry["part_json"], quick)
    return problems


def part_problems(folder: Place, record: Mapping[str, Any] | None = None, quick: bool = False) -> list[str]:
    """What is wrong with one part; record: the manifest's, of its `part.json`."""
    try:
        content = read_part_json(folder, record)
    except (UserError, OSError) as error:
        return [str(error)]
    data, files = data_folder(folder, content), content["files"]
    sizes = data.sizes()
    unlisted = sorted(set(sizes) - set(files) - {PART_JSON})
    rows = ", ".join(row["id"] for row in content["rows"][:3])
    named = f"rows {rows}{', ...' if len(content['rows']) > 3 else ''}"
    problems = [f"{text} [{named}]" for text in _file_problems(data, files, sizes, quick)]
    return problems + [f"{data / name} is not listed in {PART_JSON}; nothing reads it: remove it" for name in unlisted]


def _file_problems(folder: Place, files: Mapping[str, Any], sizes: Mapping[str, int | None], quick: bool) -> list[str]:
    found = []
    for name, record in files.items():
        sizes_only = quick and not name.endswith(".json")
        found.append(size_problem(folder / name, sizes.get(name), record) if sizes_only else problem(folder / name, record))
    return [text for text in found if text is not None]
