"""Hidden states of one kind in a part: the array itself, and what a lossy codec keeps beside it. Legend: n tokens, W channels.

NAME            [T, W]   the states, exact or quantised
NAME_scale               int8: [chunks, W] of each channel of a chunk; fp8: [T] of each token
NAME_token_at   [E]      tokens that are kept exactly, NAME_token [E, W] their states
NAME_column_at  [F, 2]   chunks and channels that are kept exactly, NAME_column [F * B] their values, B tokens each
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..records import STORAGE_DTYPE
from .arrays import ArrayReader, ArrayWriter, scratch
from .format import StateLayout
from .lazy import lazy
from .numeric import Quantised, dequantise, put_float32, quantise


class StateWriter:
    """Appends states; what the codec does is done by the pool's threads, where there are any."""

    def __init__(self, folder: Path, name: str, layout: StateLayout, pool: ThreadPoolExecutor | None, waiting: int):
        self._layout = layout
        self._pool = pool
        self._waiting = waiting
        self._name = name
        self.arrays = {array: ArrayWriter(folder / array, each, pool, waiting) for array, each in layout.arrays(name).items()}
        self._lossy = bool(layout.companions)
        self._tokens = 0  # in finished chunks
        self._done = 0  # chunks that are quantised
        self._quantising: deque[tuple[np.ndarray, Future[Quantised] | Quantised]] = deque()
        self._open_chunk()

    def append(self, states: np.ndarray, exact: np.ndarray) -> None:
        """states [n, W] in storage dtype; exact [n] bool: tokens that a lossy codec has to keep as they are."""
        if not self._lossy:
            self.arrays[self._name].append(states)
            return
        while len(states):
            taken = min(len(states), len(self._chunk) - self._filled)
            end = self._filled + taken
            self._chunk[self._filled : end], self._exact[self._filled : end] = states[:taken], exact[:taken]
            states, exact, self._filled = states[taken:], exact[taken:], end
            if end == len(self._chunk):
                self._flush()

    def close(self) -> None:
        if self._lossy and self._filled:
            self._flush()
        self._append_finished(0)
        for array in self.arrays.values():
            array.close()

    def abandon(self) -> None:
        self._quantising.clear()
        for array in self.arrays.values():
            array.abandon()

    def _open_chunk(self) -> None:
        rows = self._layout.main.chunk_rows if self._lossy else 0
        self._chunk = np.zeros((rows, *self._layout.main.row_shape), STORAGE_DTYPE[self._layout.dtype])
        self._exact = np.zeros(rows, bool)
        self._filled = 0

    def _flush(self) -> None:
        kept = np.flatnonzero(self._exact)
        self.arrays[f"{self._name}_token_at"].append(self._tokens + kept)
        self.arrays[f"{self._name}_token"].append(self._chunk[kept])
        self._exact[self._filled :] = True  # nothing is there
        filled, work = self._filled, (self._layout.codec, self._chunk, self._layout.dtype, self._exact)
        self._quantising.append((self._chunk[:filled], self._pool.submit(quantise, *work) if self._pool else quantise(*work)))
        self._tokens += filled
        self._open_chunk()
        self._append_finished(self._waiting)

    def _append_finished(self, waiting: int) -> None:
        while len(self._quantising) > waiting:
            chunk, work = self._quantising.popleft()
            self._append_quantised(chunk, work if isinstance(work, Quantised) else work.result())

    def _append_quantised(self, chunk: np.ndarray, quantised: Quantised) -> None:
        """chunk [n, W]: the tokens that are really there."""
        name, columns = self._name, quantised.columns
        self.arrays[name].append(quantised.main[: len(chunk)])
        if quantised.scale is not None:
            self.arrays[f"{name}_scale"].append(quantised.scale if self._layout.codec == "int8" else quantised.scale[: len(chunk)])
        padded = np.zeros((len(columns), self._layout.main.chunk_rows), chunk.dtype)
        padded[:, : len(chunk)] = chunk[:, columns].T
        self.arrays[f"{name}_column_at"].append(np.stack([np.full_like(columns, self._done), columns], axis=1))
        self.arrays[f"{name}_column"].append(padded.reshape(-1))
        self._done += 1


class StateReader:
    """Reads ranges of states, what a codec did undone."""

    def __init__(self, layout: StateLayout, main: ArrayReader, companions: Mapping[str, ArrayReader]):
        """companions: by suffix."""
        self._codec = layout.codec
        self._dtype = layout.dtype
        self._main = main
        self._companions = companions
        self.width = main.layout.row_shape[0]
        self.length = main.length

    def read(self, start: int, stop: int) -> np.ndarray:
        """[stop - start, W] in storage dtype."""
        out = np.empty((stop - start, self.width), STORAGE_DTYPE[self._dtype])
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Tokens [start, stop) into `out` [stop - start, W] of storage dtype, which may be columns of a wider array."""
        if not self._companions or self._codec == "bitround":
            self._main.read_into(start, stop, out)
        else:
            self._dequantise(start, stop, out)
        if self._companions and stop > start:
            self._put_columns(start, stop, out)
            self._put_tokens(start, stop, out)

    def will_need(self, start: int, stop: int) -> None:
        """As ArrayReader.will_need."""
        self._main.will_need(start, stop)

    def _dequantise(self, start: int, stop: int, out: np.ndarray) -> None:
        main = scratch("quantised", (stop - start, self.width), self._main.layout.dtype)
        self._main.read_into(start, stop, main)
        if self._codec == "fp8":
            put_float32(dequantise("fp8", main, self._companions["scale"].read(start, stop), self._dtype), out, self._dtype)
            return
        for chunk, low, high in self._chunks(start, stop):
            scale = self._companions["scale"].read(chunk, chunk + 1)
            put_float32(dequantise("int8", main[low:high], scale, self._dtype), out[low:high], self._dtype)

    def _chunks(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(chunk, low, high): tokens [low, high) of the range lie in that chunk."""
        rows = self._main.layout.chunk_rows
        chunks = range(start // rows, -(-stop // rows))
        return [(chunk, max(start, chunk * rows) - start, min(stop, (chunk + 1) * rows) - start) for chunk in chunks]

    def _put_columns(self, start: int, stop: int, out: np.ndarray) -> None:
        rows = self._main.layout.chunk_rows
        for chunk, low, high in self._chunks(start, stop):
            first, last = np.searchsorted(self._column_at[:, 0], [chunk, chunk + 1]).tolist()
            if first < last:
                values = self._companions["column"].read(first * rows, last * rows).reshape(-1, rows)  # [f, B]
                begin = start + low - chunk * rows
                out[low:high, self._column_at[first:last, 1]] = values[:, begin : begin + high - low].T

    def _put_tokens(self, start: int, stop: int, out: np.ndarray) -> None:
        first, last = np.searchsorted(self._token_at, [start, stop]).tolist()
        if first < last:
            out[self._token_at[first:last] - start] = self._companions["token"].read(first, last)

    @lazy
    def _column_at(self) -> np.ndarray:
        return self._whole("column_at")

    @lazy
    def _token_at(self) -> np.ndarray:
        return self._whole("token_at")

    def _whole(self, suffix: str) -> np.ndarray:
        array: Any = self._companions[suffix]
        return array.read(0, array.length)
