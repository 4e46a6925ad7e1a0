"""One sharded array on disk: the writer, and a reader. Legend: n entries along the first axis.

    shard file   | chunk 0 | chunk 1 | ... | offset, size of each chunk (uint64 pairs) | crc32c of that index |
    chunk        | bytes, Blosc-compressed or not | crc32c of them |

Chunks wholly beyond the array's end have offset and size 2^64-1; every other chunk is there, all-zero ones too.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import xxhash
from numcodecs.blosc import BITSHUFFLE, SHUFFLE, Blosc

from ..records import UserError
from .files import MEND, write_bytes
from .format import Layout, array_metadata, blosc_settings, json_bytes, layout_from_metadata, shard_file
from .places import Place

_CRC_BYTES = 4
_ABSENT = 2**64 - 1
_SHUFFLES = {"shuffle": SHUFFLE, "bitshuffle": BITSHUFFLE}


def _crc(data: Any) -> bytes:
    return google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")


def _blosc(layout: Layout) -> Blosc | None:
    """The codec of an array's chunks; None where they are stored as they are."""
    settings = blosc_settings(layout)
    if settings is None:
        return None
    names = {name: settings[name] for name in ("cname", "clevel", "blocksize", "typesize")}
    return Blosc(shuffle=_SHUFFLES[settings["shuffle"]], **names)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class ArrayWriter:
    """Appends to one new array. Keeps a few chunks in memory; they go to disk as they fill, `zarr.json` last.

    With a `pool` chunks are encoded by its threads. The bytes are the same with and without.
    """

    def __init__(self, folder: Path, layout: Layout, pool: ThreadPoolExecutor | None = None, waiting: int = 4):
        """waiting: chunks that may be in the pool at once."""
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}  # file name -> record
        self.dtype = layout.dtype
        self._layout = layout
        self._pool = pool
        self._waiting = waiting
        self._encoding: deque[Future[bytes]] = deque()
        self._chunk = self._empty_chunk()
        self._filled = 0  # entries in the open chunk
        self._flushed = 0  # entries in finished chunks
        self._written = 0  # chunks that are on their way to the disk
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
        if self._flushed == 0 and not self._layout.whole_chunks:  # a single partial chunk: do not pad it
            self._layout = replace(self._layout, chunk_rows=max(1, self._filled), chunks_per_shard=1)
            self._chunk = self._chunk[: max(1, self._filled)]
        if self._filled:
            self._flush()
        self._write_finished(0)
        self._close_shard()
        self.folder.mkdir(exist_ok=True)
        self.files["zarr.json"] = write_bytes(self.folder / "zarr.json", json_bytes(array_metadata(self._layout, length)))

    def abandon(self) -> None:
        """Close what is open without finishing it."""
        for encoding in self._encoding:
            encoding.cancel()
        self._encoding.clear()
        if self._shard is not None:
            with contextlib.suppress(OSError):  # what it could not write, it tries once more
                self._shard.handle.close()
            self._shard = None

    def _empty_chunk(self) -> np.ndarray:
        return np.zeros((self._layout.chunk_rows, *self._layout.row_shape), self._layout.dtype)

    def _flush(self) -> None:
        """Hand the open chunk on; the last chunk of an array is padded with zeros."""
        chunk, self._chunk = self._chunk, self._empty_chunk()
        if self._pool is None:
            self._write_chunk(encode_chunk(chunk, self._layout))
        else:
            self._encoding.append(self._pool.submit(encode_chunk, chunk, self._layout))
            self._write_finished(self._waiting)
        self._flushed += self._filled
        self._filled = 0

    def _write_finished(self, waiting: int) -> None:
        """Write encoded chunks in their order until at most `waiting` are left in the pool."""
        while self._encoding and (len(self._encoding) > waiting or self._encoding[0].done()):
            self._write_chunk(self._encoding.popleft().result())

    def _write_chunk(self, data: bytes) -> None:
        if self._shard is None:
            self.folder.mkdir(exist_ok=True)
            number = self._written // self._layout.chunks_per_shard
            self._shard = _ShardWriter(self.folder / shard_file(self._layout, number), self._layout.chunks_per_shard)
        self._written += 1
        self._shard.add(data)
        if self._shard.full:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.files[self._shard.path.name] = self._shard.close()
            self._shard = None


def encode_chunk(chunk: np.ndarray, layout: Layout) -> bytes:
    """A chunk as it lies on disk, with its checksum."""
    blosc = _blosc(layout)
    data = chunk.tobytes() if blosc is None else blosc.encode(chunk)
    return data + _crc(data)


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
        index = self._index.tobytes()
        self._write(index + _crc(index))
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
    """An open shard file and its checked index."""

    def __init__(self, where: Place, chunks: int):
        self.where = where
        try:
            self._file = where.open()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{where} is missing: it cannot be opened; {MEND}") from None
        tail = chunks * 16 + _CRC_BYTES
        data = self.read(max(0, self._file.size - tail), tail)
        if not _crc_fits(data):
            raise UserError(f"{where}: the checksum of its index is wrong; the file is damaged: {MEND}")
        self.index = data[:-_CRC_BYTES].copy().view("<u8").reshape(chunks, 2)  # [chunks, 2] offset and size
        present = self.index[self.index[:, 0] != _ABSENT]
        if (present.sum(1) > self._file.size - tail).any():
            raise UserError(f"{where}: its index points beyond its {self._file.size} bytes: {MEND}")

    @property
    def slow_requests(self) -> bool:
        return self._file.slow_requests

    def will_need(self, offset: int, size: int) -> None:
        self._file.will_need(offset, size)

    def read(self, offset: int, size: int) -> np.ndarray:
        """[size] uint8, in memory that this thread's next read uses again."""
        data = scratch("file", (size,), np.dtype(np.uint8))
        found = self._file.read_into(offset, data)
        if found != size:
            raise UserError(f"{self.where} ends at byte {offset + found}, expected {size} bytes from {offset}: {MEND}")
        return data


def _crc_fits(data: np.ndarray) -> bool:
    """Whether the last four bytes are the checksum of those before."""
    return len(data) >= _CRC_BYTES and google_crc32c.value(data[:-_CRC_BYTES]) == int.from_bytes(data[-_CRC_BYTES:].tobytes(), "little")


_scratch = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory this thread uses again with the next call of that name: fresh pages cost more than decoding."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = getattr(_scratch, name, None)
    if buffer is None or len(buffer) < size:
        buffer = np.empty(size + size // 4, np.uint8)
        setattr(_scratch, name, buffer)
    return buffer[:size].view(dtype).reshape(shape)


class ArrayReader:
    """Reads ranges of one array, every chunk's checksum verified.

    `open_shard` may be a cache around `Shard`, to keep files open and their indexes read.
    """

    def __init__(self, where: Place, expected: Layout, metadata: bytes, open_shard: Callable[[Place, int], Shard] = Shard):
        self.where = where
        self._open_shard = open_shard
        self.layout, self.length = layout_from_metadata(json.loads(metadata), expected, where / "zarr.json")
        self._blosc = _blosc(self.layout)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) as a new array [stop - start, ...]."""
        out = np.empty((max(0, stop - start), *self.layout.row_shape), self.layout.dtype)
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Entries [start, stop) into `out` [stop - start, ...], which may be columns of a wider array."""
        if not 0 <= start <= stop <= self.length:
            raise UserError(f"{self.where} has {self.length} entries; asked for [{start}, {stop}): its part is damaged, {MEND}")
        for shard, low, high in self._shards(start, stop):
            begin = shard * self._shard_rows
            self._read_shard(shard, low - begin, high - begin, out[low - start : high - start])

    def will_need(self, start: int, stop: int) -> None:
        """Let the disk fetch what `read_into` of this range will read, while something else is decoded."""
        for shard, low, high in self._shards(start, min(stop, self.length)):
            opened, begin = self._opened(shard), shard * self._shard_rows
            first, last = (low - begin) // self.layout.chunk_rows, (high - 1 - begin) // self.layout.chunk_rows
            offset = int(opened.index[first, 0])
            opened.will_need(offset, max(0, int(opened.index[last].sum()) - offset))

    @property
    def _shard_rows(self) -> int:
        return self.layout.chunk_rows * self.layout.chunks_per_shard

    def _shards(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, low, high): entries [low, high) of a range lie in that shard."""
        rows = self._shard_rows
        shards = range(start // rows, -(-stop // rows) if stop > start else 0)
        return [(shard, max(start, shard * rows), min(stop, (shard + 1) * rows)) for shard in shards]

    def _opened(self, shard: int) -> Shard:
        return self._open_shard(self.where / shard_file(self.layout, shard), self.layout.chunks_per_shard)

    def _read_shard(self, shard: int, low: int, high: int, out: np.ndarray) -> None:
        """Fill `out` with entries [low, high) of a shard."""
        rows = self.layout.chunk_rows
        opened = self._opened(shard)
        first, last = low // rows, (high - 1) // rows
        entries = opened.index[first : last + 1].tolist()
        if [_ABSENT, _ABSENT] in entries:
            raise UserError(f"{opened.where}: a chunk among {first} to {last} was never written; the file is damaged: {MEND}")
        origin = min(offset for offset, _ in entries)
        data = opened.read(origin, max(offset + size for offset, size in entries) - origin) if opened.slow_requests else None
        for chunk, (offset, size) in enumerate(entries, start=first):
            # Of a local file chunk by chunk: what is read stays in the processor's cache until it is decoded, and the disk fetches the next
            body = opened.read(offset, size) if data is None else data[offset - origin : offset - origin + size]
            if not _crc_fits(body):
                raise UserError(f"{opened.where}: the checksum of chunk {chunk} is wrong; the file is damaged: {MEND}")
            begin, end = max(low, chunk * rows), min(high, (chunk + 1) * rows)
            self._decode(body[:-_CRC_BYTES], begin - chunk * rows, out[begin - low : end - low])

    def _decode(self, body: np.ndarray, skip: int, out: np.ndarray) -> None:
        """Decode a chunk and leave its entries from `skip` on in `out`."""
        shape = (self.layout.chunk_rows, *self.layout.row_shape)
        if self._blosc is None:
            out[...] = body.view(self.layout.dtype).reshape(shape)[skip : skip + len(out)]
        elif out.shape == shape and out.flags.c_contiguous:
            self._blosc.decode(body, out)
        else:
            whole = scratch("chunk", shape, self.layout.dtype)
            self._blosc.decode(body, whole)
            out[...] = whole[skip : skip + len(out)]
