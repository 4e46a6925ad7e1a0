"""A sealed part opened for reading. Legend: T tokens, H hidden size, N rows, S turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..records import Sample, UserError
from .arrays import ArrayReader, Shard
from .files import MEND, check
from .format import PART_JSON, DumpSpec, Layout, last_positions, layer_name, part_layouts, read_with_digest


def read_part_json(folder: Path) -> dict[str, Any]:
    """The part's own account of itself."""
    path = folder / PART_JSON
    if not path.is_file():
        raise UserError(f"{path} is missing: dump this unit")
    return read_with_digest(path)


def open_array(folder: Path, part: Mapping[str, Any], name: str, expected: Layout, open_shard: Callable[[Path, int], Shard]) -> ArrayReader:
    """One array of a part, its metadata verified."""
    path, record = folder / name / "zarr.json", part["files"].get(f"{name}/zarr.json")
    if record is None:
        raise UserError(f"{folder / PART_JSON} lists no array {name}, which its spec asks for: remove the part and dump its unit again")
    check(path, record)
    return ArrayReader(folder / name, expected, path.read_bytes(), open_shard)


class Part:
    """Rows of one part. Opening it checks that every file is there with its size; content is checked as it is read."""

    def __init__(
        self, folder: Path, spec: DumpSpec, record: Mapping[str, Any] | None = None, open_shard: Callable[[Path, int], Shard] = Shard
    ):
        if record is not None:
            check(folder / PART_JSON, record)
        content = read_part_json(folder)
        for name, file in content["files"].items():
            check(folder / name, file, sizes_only=True)
        self.folder = folder
        self._arrays = {name: open_array(folder, content, name, layout, open_shard) for name, layout in part_layouts(spec).items()}
        self.offsets = self.whole("offsets")  # [N+1]
        self.turn_offsets = self.whole("turn_offsets")  # [N+1]
        self.turns = self.whole("turns")  # [S, 2]
        self.last_offsets = self.whole("last_offsets")  # [N+1]

    def whole(self, name: str) -> np.ndarray:
        """All entries of one array."""
        return self._arrays[name].read(0, self._arrays[name].length)

    def input_ids(self, row: int) -> np.ndarray:
        """[T] int32"""
        return self._arrays["input_ids"].read(*self.offsets[row : row + 2].tolist())

    def turns_of(self, row: int) -> tuple[tuple[int, int], ...]:
        """The row's supervised ranges [start, end), counted from its first token."""
        start, end = self.turn_offsets[row : row + 2]
        return tuple((a, b) for a, b in self.turns[start:end].tolist())

    def sample(self, row: int, name: str, layers: tuple[int, ...]) -> Sample:
        """One row with the hidden states of these layers."""
        start, stop = self.offsets[row : row + 2].tolist()
        turns = self.turns_of(row)
        positions = last_positions(turns, stop - start)
        last_start, last_stop = self.last_offsets[row : row + 2].tolist()
        if last_stop - last_start != len(positions):
            raise UserError(f"{self.folder}: {last_stop - last_start} last states, but its turns need {len(positions)}: {MEND}")
        return Sample(
            id=name,
            input_ids=self.input_ids(row),
            turns=turns,
            aux={layer: self._arrays[layer_name(layer)].read(start, stop) for layer in layers},
            last=self._arrays["last"].read(last_start, last_stop),
            last_positions=positions,
        )
