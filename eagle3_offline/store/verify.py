"""Verifies a sealed dump against its own records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import UserError
from .files import damage, problem, size_problem
from .format import PART_JSON, OtherVersion
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
        data, files = data_folder(folder, content), content["files"]
        sizes = data.sizes()
    except (UserError, OSError) as error:
        return [str(error)]
    problems = [f"{text} [{_first_rows(content)}]" for text in _file_problems(data, files, sizes, quick)]
    return problems + [
        f"{data / name} is not listed in {PART_JSON}; nothing reads it: remove it" for name in unlisted_files(content, sizes)
    ]


def part_damage(folder: Place) -> list[str]:
    """Why a part has to be made again; empty for a whole one.

    Raises OSError where it cannot be told, OtherVersion for a part that another release wrote.
    """
    try:
        content = read_part_json(folder)
    except OtherVersion:
        raise
    except UserError as error:
        return [str(error)]
    data = data_folder(folder, content)
    found = [damage(data / name, record) for name, record in content["files"].items()]
    return [text for text in found if text is not None]


def unlisted_files(content: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """Files in a part that it says nothing of."""
    return sorted(set(sizes) - set(content["files"]) - {PART_JSON})


def _first_rows(content: Mapping[str, Any]) -> str:
    names = [row["id"] for row in content["rows"]]
    return "rows " + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _file_problems(folder: Place, files: Mapping[str, Any], sizes: Mapping[str, int | None], quick: bool) -> list[str]:
    found = []
    for name, record in files.items():
        sizes_only = quick and not name.endswith(".json")
        found.append(size_problem(folder / name, sizes.get(name), record) if sizes_only else problem(folder / name, record))
    return [text for text in found if text is not None]
