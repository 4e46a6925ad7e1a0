"""Verifies a sealed dump against its own records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..records import UserError
from .files import damage, problem, read_checked, size_problem
from .format import PART_JSON, DumpSpec, OtherVersion
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
    files = manifest["files"]
    found = [_file_problem(dump, name, record, {name: (dump / name).size()}, quick) for name, record in files.items()]
    problems = [text for text in found if text is not None]
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
    found = {name: _file_problem(data, name, record, sizes, quick) for name, record in files.items()}
    problems = [f"{text} [{_text(_rows_of(data, name, content))}]" for name, text in found.items() if text is not None]
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


def _rows_of(data: Place, name: str, content: Mapping[str, Any]) -> list[str]:
    """Ids of the rows whose data a file of a part holds: of a shard along the tokens those that reach into it, else all."""
    array, _, shard = name.partition("/c.")
    ids = [row["id"] for row in content["rows"]]
    metadata = content["files"].get(f"{array}/zarr.json")
    if not shard or array not in ("input_ids", "loss_mask", *DumpSpec.from_dict(content["spec"]).aux_arrays):
        return ids
    try:
        described = json.loads(read_checked(data / array / "zarr.json", metadata))
    except (UserError, OSError):
        return ids
    size = described["chunk_grid"]["configuration"]["chunk_shape"][0]  # tokens of a shard
    first = int(shard.split(".")[0]) * size
    ends = np.cumsum([row["tokens"] for row in content["rows"]])
    low, high = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, first + size, side="left")
    return ids[low : high + 1]


def _text(ids: list[str]) -> str:
    return "rows " + ", ".join(ids[:3]) + (f", ... ({len(ids)} rows)" if len(ids) > 3 else "")


def _file_problem(folder: Place, name: str, record: Mapping[str, Any], sizes: Mapping[str, int | None], quick: bool) -> str | None:
    sizes_only = quick and not name.endswith(".json")
    return size_problem(folder / name, sizes.get(name), record) if sizes_only else problem(folder / name, record)
