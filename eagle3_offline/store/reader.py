"""Opens a sealed dump and reads its rows. Legend: T tokens, H hidden size, V vocabulary size, N rows of the dump."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..records import SPLITS, Sample, UserError
from .arrays import Shard
from .files import MEND, check, read_tensors, size_problem, tensor_dtypes
from .format import MANIFEST, ROWS, STATISTICS, TARGET, DumpSpec, json_bytes, layer_name, with_digest_checked
from .lazy import lazy
from .part import Part
from .places import Place, place
from .target_files import BASIS, TENSORS

OPEN_SHARDS = 256  # shard files that one opened dump keeps open at most

_LARGE = (f"{TARGET}/{TENSORS}", f"{TARGET}/{BASIS}")  # digested when first used, not when the dump is opened


def read_manifest(where: Place | Path | str) -> dict[str, Any]:
    """The content of `dump.json`."""
    file = place(where) / MANIFEST
    try:
        data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} does not exist; expected a sealed dump: run `eagle3-offline store seal`, or name another folder") from None
    manifest = with_digest_checked(data, file)
    if data != json_bytes(manifest):  # no other record would notice a byte of white space
        raise UserError(f"{file} is not written as this format writes it; it was changed or damaged: {MEND}")
    return manifest


class Dump:
    """A sealed dump. `Dump.open` reads the manifest and the row table; parts are opened as rows of them are asked for.

    Safe to share between threads, to use after a fork (in object storage: not once it was read from), and to pickle (a copy opens
    the dump again).
    """

    def __init__(self, where: Place, manifest: Mapping[str, Any], rows: Mapping[str, np.ndarray]):
        self.where = where
        self.manifest = manifest
        self.spec = DumpSpec.from_dict(manifest["spec"])
        self.lengths = rows["length"]  # [N] int32 tokens
        self.supervised = rows["supervised"]  # [N] int32 tokens that the target generated
        self.splits = rows["split"]  # [N] uint8: 0 train, 1 eval
        self.parts = rows["part"]  # [N] int32 index into manifest["parts"]
        self.places = rows["row"]  # [N] int32 the row's place in its part
        self.sources = rows["source"]  # [N] int32 index into manifest["sources"]
        self._rows = rows
        # C-implemented caches need no lock of ours, so a fork never finds one held; opening a part twice does no harm.
        self._open_shard = lru_cache(OPEN_SHARDS)(Shard)
        self._part = lru_cache(None)(self._open_part)

    @classmethod
    def open(cls, where: Place | Path | str) -> Dump:
        """Open a dump in a folder or under s3://; raises UserError for another version, or files that differ from the manifest."""
        where = place(where)
        manifest = read_manifest(where)
        for name, record in manifest["files"].items():
            if name not in _LARGE:
                check(where / name, record)
            elif text := size_problem(where / name, (where / name).size(), record):
                raise UserError(text)
        return cls(where, manifest, read_tensors(where / ROWS))

    def __reduce__(self) -> tuple[Any, ...]:
        return Dump.open, (str(self.where),)

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, i: int) -> str:
        """The row's id."""
        start, end = self._rows["id_offsets"][i : i + 2]
        return self._rows["id_bytes"][start:end].tobytes().decode()

    def rows(self, split: str) -> np.ndarray:
        """Indices of a split's rows, ascending."""
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def rows_of_part(self, number: int) -> list[int]:
        """Indices of the rows of manifest["parts"][number], in the order in which they are stored."""
        rows = np.flatnonzero(self.parts == number)
        return rows[np.argsort(self.places[rows])].tolist()

    def sample(
        self, i: int, layers: Iterable[int] | None = None, window: tuple[int, int] | None = None, aux: np.ndarray | None = None
    ) -> Sample:
        """One row with the captured states of `layers` (None: all that the dump has); other layers are not read.

        window: tokens [start, stop) of the row instead of all; its turns are cut to it. aux: memory [at least T, C] of storage
        dtype to use again for the states, which are then valid until it is used once more.
        """
        arrays = self._arrays(layers)
        return self._read(i, lambda part, row: part.sample(row, self.ids(i), arrays, window, aux))

    def samples(
        self, rows: Iterable[int], layers: Iterable[int] | None = None, *, threads: int = 2, reuse: bool = False
    ) -> Iterator[Sample]:
        """The samples of `rows` in their order, read and decoded by threads ahead of their use.

        reuse: the states' memory is used again, so that they are valid until the next sample is asked for; faster by a fifth. The
        rows must then be known beforehand, else they may come one by one.
        """
        layers = None if layers is None else tuple(layers)
        arrays = self._arrays(layers)
        ahead = 2 * threads
        memory: list[np.ndarray | None] = [None] * (ahead + 1)
        if reuse:
            rows = [int(i) for i in rows]
            shape = max((int(self.lengths[i]) for i in rows), default=0), self.spec.aux_width * len(arrays)
            memory = [np.empty(shape, self.spec.storage_dtype) for _ in memory]
        pool = ThreadPoolExecutor(threads)
        try:
            pending: deque[Future[Sample]] = deque()
            for number, i in enumerate(rows):
                with suppress(UserError, OSError):  # raised when the row is read
                    self._read(int(i), lambda part, row: part.will_need(row, arrays))
                pending.append(pool.submit(self.sample, int(i), layers, None, memory[number % len(memory)]))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _arrays(self, layers: Iterable[int] | None) -> tuple[str, ...]:
        if layers is None or (wanted := tuple(layers)) == self.spec.layers:
            return self.spec.aux_arrays
        if self.spec.compact:
            raise UserError(
                f"layers {list(wanted)} were asked for, but {self.where} is a compact dump: it holds a projection of layers "
                f"{list(self.spec.layers)} together. Use all of them, or dump again"
            )
        if unknown := [layer for layer in wanted if layer not in self.spec.layers]:
            raise UserError(
                f"layers {unknown} are not in {self.where}, which has {list(self.spec.layers)}; choose among these, or dump again"
            )
        return tuple(map(layer_name, wanted))

    def turns(self, i: int) -> tuple[tuple[int, int], ...]:
        """The row's supervised ranges [start, end), counted from its first token."""
        return self._read(i, lambda part, row: part.turns(row))

    def input_ids(self, i: int) -> np.ndarray:
        """[T] int32"""
        return self._read(i, lambda part, row: part.input_ids(row))

    @lazy
    def statistics(self) -> dict[str, np.ndarray]:
        """Of the train split: `token_counts` [V] int64 of generated tokens, and `rms` [C] float32 of the captured channels."""
        stored = read_tensors(self.where / STATISTICS)
        rms = []
        for name, tokens in zip(self.spec.aux_arrays, stored["sumsq_tokens"].tolist(), strict=True):
            if tokens == 0:
                raise UserError(f"{self.where} has no train tokens in {name}, so its channels have no rms; seal it with train rows")
            rms.append(np.sqrt(stored[f"sumsq_{name}"] / tokens).astype(np.float32))
        return {"token_counts": np.array(stored["token_counts"]), "rms": np.concatenate(rms)}

    @property
    def target(self) -> Place:
        """Where the target's config, tokenizer, chat template and `target.safetensors` lie."""
        return self.where / TARGET

    def target_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the target, such as config.json; empty where the target has none of that name."""
        return json.loads((self.target / name).read()) if f"{TARGET}/{name}" in self.manifest["files"] else {}

    def target_tensors(self) -> dict[str, np.ndarray]:
        """Name -> read-only array in storage dtype (bfloat16 as uint16), verified against the manifest once."""
        return dict(self._target)

    def target_dtypes(self) -> dict[str, str]:
        """Name -> logical dtype of the target's tensors."""
        return tensor_dtypes(self.target / TENSORS)

    def basis(self) -> dict[str, np.ndarray]:
        """Of a compact dump, verified: what `target/basis.safetensors` holds (FORMAT.md)."""
        if self.spec.compact is None:
            raise UserError(f"{self.where} is no compact dump: it has no basis")
        return self._checked_tensors(BASIS)

    @lazy
    def _target(self) -> dict[str, np.ndarray]:
        return self._checked_tensors(TENSORS)

    def _checked_tensors(self, name: str) -> dict[str, np.ndarray]:
        check(self.target / name, self.manifest["files"][f"{TARGET}/{name}"])
        return read_tensors(self.target / name)

    def _read(self, i: int, read: Any) -> Any:
        """Apply `read(part, row in part)`; an error names the row."""
        if not 0 <= i < len(self):
            raise UserError(f"row {i} is not in {self.where}, which has rows 0 to {len(self) - 1}")
        try:
            part, row = self._part(int(self.parts[i])), int(self.places[i])
            found = part.offsets[row : row + 2].tolist()
            start = int(self._rows["token_offset"][i])
            if found != [start, start + int(self.lengths[i])]:
                raise UserError(f"{part.folder} has it at tokens {found}, {ROWS} at {start} with {self.lengths[i]}: {MEND}")
            return read(part, row)
        except UserError as error:
            raise UserError(f"row {i} ({self.ids(i)}): {error}") from None
        except OSError as error:  # the storage, not the dump
            raise OSError(error.errno, f"row {i} ({self.ids(i)}): {error.strerror}", error.filename) from None

    def _open_part(self, number: int) -> Part:
        entry = self.manifest["parts"][number]
        part = Part(self.where / "parts" / entry["name"], self.spec, entry["part_json"], self._open_shard)
        part.forget_rows()
        return part
