"""A sealed part opened for reading. Legend: T tokens, C channels of all captured states, N rows, S turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..records import Sample, TopLogits, UserError
from .arrays import ArrayReader, Shard
from .files import MEND, read_checked, size_problem
from .format import PART_JSON, DumpSpec, check_version, last_positions, plain_layouts, state_layouts, with_digest_checked
from .lazy import lazy
from .places import Place
from .states import StateReader

OpenShard = Callable[[Place, int], Shard]


def read_part_json(folder: Place, record: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The part's own account of itself; compared with the manifest's record where one is given."""
    where = folder / PART_JSON
    if record is not None:
        content = json.loads(read_checked(where, record))  # so its own digest has nothing to add
        check_version(content["format_version"], where)
        return content
    try:
        return with_digest_checked(where.read(), where)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where} is missing: dump this unit") from None


def data_folder(folder: Place, content: Mapping[str, Any]) -> Place:
    """Where the arrays of a part lie: its own folder, or in object storage one beside it."""
    return folder if content["data"] is None else folder.parent / content["data"]


class Part:
    """Rows of one part. Opening it checks that every file is there with its size; content is checked as it is read."""

    def __init__(self, folder: Place, spec: DumpSpec, record: Mapping[str, Any] | None = None, open_shard: OpenShard = Shard):
        self.content = read_part_json(folder, record)
        self.folder = folder
        self.data = data_folder(folder, self.content)
        self._spec = spec
        self._open_shard = open_shard
        sizes = self.data.sizes()
        for name, file in self.content["files"].items():
            if text := size_problem(self.data / name, sizes.get(name), file):
                raise UserError(text)

    def forget_rows(self) -> None:
        """Drop the account of each row: a dump has it in its row table, and those of a million rows would fill memory."""
        self.content = {name: value for name, value in self.content.items() if name not in ("rows", "rejects")}

    # -- whole arrays, read when first needed

    @lazy
    def _plain(self) -> dict[str, ArrayReader]:
        return {name: self._open(name, layout) for name, layout in plain_layouts(self._spec).items()}

    @lazy
    def states(self) -> dict[str, StateReader]:
        """Readers of the captured states, and of `last`."""
        readers = {}
        for name, layout in state_layouts(self._spec).items():
            companions = {suffix: self._open(f"{name}_{suffix}", each) for suffix, each in layout.companions.items()}
            readers[name] = StateReader(layout, self._open(name, layout.main), companions)
        return readers

    def _open(self, name: str, expected: Any) -> ArrayReader:
        record = self.content["files"].get(f"{name}/zarr.json")
        if record is None:
            raise UserError(
                f"{self.folder / PART_JSON} lists no array {name}, which its spec asks for: remove the part and dump its unit again"
            )
        return ArrayReader(self.data / name, expected, read_checked(self.data / name / "zarr.json", record), self._open_shard)

    @lazy
    def offsets(self) -> np.ndarray:
        """[N+1]"""
        return self.whole("offsets")

    @lazy
    def turn_offsets(self) -> np.ndarray:
        """[N+1]"""
        return self.whole("turn_offsets")

    @lazy
    def last_offsets(self) -> np.ndarray:
        """[N+1]"""
        return self.whole("last_offsets")

    @lazy
    def all_turns(self) -> np.ndarray:
        """[S, 2]"""
        return self.whole("turns")

    def whole(self, name: str) -> np.ndarray:
        """All entries of an array that holds no states."""
        return self._plain[name].read(0, self._plain[name].length)

    # -- rows

    def input_ids(self, row: int) -> np.ndarray:
        """[T] int32"""
        return self._plain["input_ids"].read(*self.offsets[row : row + 2].tolist())

    def turns(self, row: int) -> tuple[tuple[int, int], ...]:
        """The row's supervised ranges [start, end), counted from its first token."""
        start, end = self.turn_offsets[row : row + 2]
        return tuple((a, b) for a, b in self.all_turns[start:end].tolist())

    def sample(self, row: int, name: str, arrays: tuple[str, ...], window: tuple[int, int] | None, aux: np.ndarray | None) -> Sample:
        """One row, or tokens [start, end) of it, with the captured states of these arrays.

        aux: memory to use again for them, [at least T, C] of storage dtype; else new.
        """
        begin, end = self.offsets[row : row + 2].tolist()
        turns, length = self.turns(row), end - begin
        first, stop = window or (0, length)
        if not 0 <= first < stop <= length:
            raise UserError(f"asked for tokens [{first}, {stop}) of a row with {length}")
        low, high, positions = self._teacher_range(row, turns, length, first, stop)
        self._advise(arrays, (begin + first, begin + stop), (low, high))
        return Sample(
            id=name,
            input_ids=self._plain["input_ids"].read(begin + first, begin + stop),
            turns=tuple((max(a, first) - first, min(b, stop) - first) for a, b in turns if max(a, first) < min(b, stop)),
            aux=self._aux(arrays, begin + first, begin + stop, aux),
            last=None if self._spec.compact else self.states["last"].read(low, high),
            last_positions=positions,
            top=self._top(low, high) if self._spec.compact else None,
        )

    def will_need(self, row: int, arrays: tuple[str, ...]) -> None:
        """Let the system fetch a row's states while other rows are decoded."""
        self._advise(arrays, self.offsets[row : row + 2].tolist(), self.last_offsets[row : row + 2].tolist())

    def _advise(self, arrays: tuple[str, ...], tokens: Sequence[int], teachers: Sequence[int]) -> None:
        for array in arrays:
            self.states[array].will_need(*tokens)
        if not self._spec.compact:
            self.states["last"].will_need(*teachers)

    def _teacher_range(
        self, row: int, turns: tuple[tuple[int, int], ...], length: int, first: int, stop: int
    ) -> tuple[int, int, np.ndarray]:
        """Where the window's teachers lie in their arrays [low, high), and their token positions in the window."""
        positions = last_positions(turns, length)
        low, high = self.last_offsets[row : row + 2].tolist()
        if high - low != len(positions):
            raise UserError(f"{self.folder}: {high - low} last states, but its turns need {len(positions)}: {MEND}")
        skipped, kept = np.searchsorted(positions, [first, stop]).tolist()
        return low + skipped, low + kept, positions[skipped:kept] - first

    def _aux(self, arrays: tuple[str, ...], start: int, stop: int, memory: np.ndarray | None) -> np.ndarray:
        width = self._spec.aux_width
        shape = (stop - start, width * len(arrays))
        if memory is None:
            out = np.empty(shape, self._spec.storage_dtype)
        elif memory.dtype != self._spec.storage_dtype or memory.ndim != 2 or memory.shape[0] < shape[0] or memory.shape[1] < shape[1]:
            raise UserError(f"the memory for aux is {memory.dtype} {list(memory.shape)}; expected {self._spec.storage_dtype} {list(shape)}")
        else:
            out = memory[: shape[0], : shape[1]]
        for number, name in enumerate(arrays):
            self.states[name].read_into(start, stop, out[:, number * width : (number + 1) * width])
        return out

    def _top(self, low: int, high: int) -> TopLogits:
        return TopLogits(
            ids=self._plain["top_ids"].read(low, high).astype(np.int32),
            log_probs=self._plain["top_log_probs"].read(low, high),
            log_normaliser=self._plain["log_normaliser"].read(low, high),
        )
