"""One sharded array on disk: the writer, and a reader with one pread per shard. Legend: n entries along the first axis.

    shard file   | chunk 0 | chunk 1 | ... | offset, size of each chunk (uint64 pairs) | crc32c of that index |
    chunk        | bytes, Blosc-compressed or not | crc32c of them |

Chunks wholly beyond the array's end have offset and size 2^64-1; every other chunk is there, all-zero ones too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import xxhash
from numcodecs.blosc import SHUFFLE, Blosc

from ..records import UserError
from .files import MEND, write_bytes
from .format import BLOSC_BLOCK_BYTES, Layout, array_metadata, json_bytes, layout_from_metadata, shard_file

_CRC_BYTES = 4
_ABSENT = 2**64 - 1


def _with_crc(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")


def _without_crc(data: bytes) -> bytes | None:
    """The bytes before the checksum; None where it does not fit them."""
    body = data[:-_CRC_BYTES]
    return body if google_crc32c.value(body) == int.from_bytes(data[-_CRC_BYTES:], "little") else None


def _blosc() -> Blosc:
    return Blosc("zstd", clevel=1, shuffle=SHUFFLE, blocksize=BLOSC_BLOCK_BYTES)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class ArrayWriter:
    """Appends to one new array. Keeps one chunk in memory; chunks go to disk as they fill, `zarr.json` last."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}  # file name -> record
        self._layout = layout
        self._chunk = np.zeros((layout.chunk_rows, *layout.row_shape), layout.dtype)
        self._filled = 0  # entries in the open chunk
        self._flushed = 0  # entries in finished chunks
        self._shard: _ShardWriter | None = None

    def append(self, values: np.ndarray) -> None:
        """Append [n, ...] entries of the array's own dtype."""
        assert values.dtype == self._layout.dtype and values.shape[1:] == self._layout.row_shape
        while len(values):
            taken = min(len(values), len(self._chunk) - self._filled)
            self._chunk[self._filled : self._filled + taken] = values[:taken]
            self._filled += taken
            values = values[taken:]
            if self._filled == len(self._chunk):
                self._flush()

    def close(self) -> None:
        """Write what is left, then the metadata with the final length. `files` is complete afterwards."""
        length = self._flushed + self._filled
        if self._flushed == 0:  # a single partial chunk: do not pad it
            self._layout = replace(self._layout, chunk_rows=max(1, length), chunks_per_shard=1)
            self._chunk = self._chunk[: max(1, length)]
        if self._filled:
            self._flush()
        self._close_shard()
        self.folder.mkdir(exist_ok=True)
        self.files["zarr.json"] = write_bytes(self.folder / "zarr.json", json_bytes(array_metadata(self._layout, length)))

    def abandon(self) -> None:
        """Close the open file, if any, without finishing it."""
        if self._shard is not None:
            self._shard.handle.close()

    def _flush(self) -> None:
        self._chunk[self._filled :] = 0  # the last chunk of an array is padded
        data = self._chunk.tobytes() if self._layout.codec == "none" else _blosc().encode(self._chunk)
        if self._shard is None:
            self.folder.mkdir(exist_ok=True)
            number = self._flushed // (self._layout.chunk_rows * self._layout.chunks_per_shard)
            self._shard = _ShardWriter(self.folder / shard_file(self._layout, number), self._layout.chunks_per_shard)
        self._shard.add(_with_crc(data))
        self._flushed += self._filled
        self._filled = 0
        if self._shard.full:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.files[self._shard.path.name] = self._shard.close()
            self._shard = None


class _ShardWriter:
    """Writes one shard front to back and digests it on the way."""

    def __init__(self, path: Path, chunks: int):
        self.path = path
        self.handle: BinaryIO = open(path, "xb")  # noqa: SIM115  closed by close() or ArrayWriter.abandon()
        self._digest = xxhash.xxh3_128()
        self._index = np.full((chunks, 2), _ABSENT, "<u8")
        self._chunks = 0
        self._size = 0

    @property
    def full(self) -> bool:
        return self._chunks == len(self._index)

    def add(self, data: bytes) -> None:
        self._index[self._chunks] = self._size, len(data)
        self._chunks += 1
        self._write(data)

    def close(self) -> dict[str, Any]:
        self._write(_with_crc(self._index.tobytes()))
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()
        return {"bytes": self._size, "xxh3_128": self._digest.hexdigest()}

    def _write(self, data: bytes) -> None:
        self.handle.write(data)
        self._digest.update(data)
        self._size += len(data)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Shard:
    """An open shard file and its checked index. The descriptor closes with the last reference."""

    def __init__(self, path: Path, chunks: int):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path} cannot be opened ({error.strerror}): {MEND}") from None
        size, tail = os.fstat(self._descriptor).st_size, chunks * 16 + _CRC_BYTES
        body = _without_crc(self.pread(max(0, size - tail), tail))
        if body is None:
            raise UserError(f"{path}: the checksum of its index is wrong; the file is damaged: {MEND}")
        self.index = np.frombuffer(body, "<u8").reshape(chunks, 2)  # [chunks, 2] offset and size
        present = self.index[self.index[:, 0] != _ABSENT]
        if (present.sum(1) > size - tail).any():
            raise UserError(f"{path}: its index points beyond its {size} bytes: {MEND}")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def pread(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{self.path} ends at byte {offset + len(data)}, expected {size} bytes from {offset}: {MEND}")
        return data


class ArrayReader:
    """Reads ranges of one array: one pread per shard, every chunk's checksum verified, whole chunks decoded in place.

    `open_shard` may be a cache around `Shard`, to keep files open and their indexes read.
    """

    def __init__(self, folder: Path, expected: Layout, metadata: bytes, open_shard: Callable[[Path, int], Shard] = Shard):
        self.folder = folder
        self._open_shard = open_shard
        self.layout, self.length = layout_from_metadata(json.loads(metadata), expected, folder / "zarr.json")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) as a new array [stop - start, ...]."""
        if not 0 <= start <= stop <= self.length:
            raise UserError(f"{self.folder} has {self.length} entries; asked for [{start}, {stop}): its part is damaged, {MEND}")
        out = np.empty((stop - start, *self.layout.row_shape), self.layout.dtype)
        shard_rows = self.layout.chunk_rows * self.layout.chunks_per_shard
        for shard in range(start // shard_rows, -(-stop // shard_rows) if stop > start else 0):
            begin = shard * shard_rows
            low, high = max(start, begin), min(stop, begin + shard_rows)
            self._read_shard(shard, low - begin, high - begin, out[low - start : high - start])
        return out

    def _read_shard(self, shard: int, low: int, high: int, out: np.ndarray) -> None:
        """Fill `out` with entries [low, high) of a shard."""
        rows = self.layout.chunk_rows
        opened = self._open_shard(self.folder / shard_file(self.layout, shard), self.layout.chunks_per_shard)
        first, last = low // rows, (high - 1) // rows
        entries = opened.index[first : last + 1]
        if (entries == _ABSENT).any():
            raise UserError(f"{opened.path}: a chunk among {first} to {last} was never written; the file is damaged: {MEND}")
        origin = int(entries[:, 0].min())
        data = opened.pread(origin, int(entries.sum(1).max()) - origin)
        for chunk, (offset, size) in enumerate(entries.tolist(), start=first):
            body = _without_crc(data[offset - origin : offset - origin + size])
            if body is None:
                raise UserError(f"{opened.path}: the checksum of chunk {chunk} is wrong; the file is damaged: {MEND}")
            begin, end = max(low, chunk * rows), min(high, (chunk + 1) * rows)
            self._decode(body, begin - chunk * rows, out[begin - low : end - low])

    def _decode(self, body: bytes, skip: int, out: np.ndarray) -> None:
        """Decode a chunk and leave its entries from `skip` on in `out`."""
        rows = self.layout.chunk_rows
        if self.layout.codec == "none":
            out[...] = np.frombuffer(body, self.layout.dtype).reshape(rows, *self.layout.row_shape)[skip : skip + len(out)]
        elif len(out) == rows:
            _blosc().decode(body, out)
        else:
            whole = np.empty((rows, *self.layout.row_shape), self.layout.dtype)
            _blosc().decode(body, whole)
            out[...] = whole[skip : skip + len(out)]
