"""Writes one part: rows as they come, in bounded memory, published by one rename. Legend: T tokens, H hidden size, V vocabulary, N rows."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np

from ..records import SPLITS, CapturedRow, Reject, UserError
from ..runs import fsync_path, unit_name
from .arrays import ArrayWriter
from .files import write_bytes
from .format import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    GROUP_METADATA,
    OUTLIER_FACTOR,
    PART_JSON,
    SHARD_BYTES,
    DumpSpec,
    json_bytes,
    last_positions,
    layer_name,
    part_folder,
    part_layouts,
    with_digest,
)

# Bits of a float's exponent; all set means infinite or not a number.
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


class BadRow(UserError):
    """A row that cannot be stored. Nothing of it was recorded; reject it and go on."""


class PartExists(UserError):
    """The unit's part is sealed already."""

    def __init__(self, folder: Path):
        super().__init__(
            f"{folder} exists already: a sealed part is never written again. Skip its unit, or remove the folder to dump it anew"
        )


class PartWriter:
    """Context manager around one part of a dump. Leaving it without `seal` removes everything it wrote. One thread only."""

    def __init__(
        self, dump: Path, unit: int, split: str, spec: DumpSpec, *, chunk_bytes: int = CHUNK_BYTES, shard_bytes: int = SHARD_BYTES
    ):
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        self.unit, self.split, self.spec = unit, split, spec
        self.folder = part_folder(dump, unit)
        self._temporary = self.folder.with_name(f".{unit_name(unit)}.{socket.gethostname()}.{os.getpid()}.tmp")
        self._layouts = part_layouts(spec, chunk_bytes, shard_bytes)
        self._rows: list[dict[str, Any]] = []
        self._rejects: dict[str, str] = {}  # id -> reason
        self._ids: set[str] = set()
        self._offsets, self._turn_offsets, self._last_offsets = [0], [0], [0]
        self._token_counts = np.zeros(spec.vocab_size, np.int64)  # [V]
        self._sumsq = {layer: np.zeros(spec.hidden_size, np.float64) for layer in spec.layers}  # [H] each
        self._sumsq_tokens = dict.fromkeys(spec.layers, 0)
        self._failed = False

    def __enter__(self) -> PartWriter:
        if self.folder.exists():
            raise PartExists(self.folder)
        shutil.rmtree(self._temporary, ignore_errors=True)  # of a dead process with our host and pid
        self._temporary.mkdir(parents=True)
        self._arrays = {name: ArrayWriter(self._temporary / name, layout) for name, layout in self._layouts.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for array in self._arrays.values():
            array.abandon()
        shutil.rmtree(self._temporary, ignore_errors=True)  # renamed away by seal

    def add(self, captured: CapturedRow) -> None:
        """Append a row. Raises BadRow, before anything is recorded, when it is not what the spec says."""
        self._check_id(captured.row.id)
        check_row(captured, self.spec, self.split)
        sums = {layer: channel_squares(states, self.spec.dtype) for layer, states in captured.aux.items()}
        for layer, (squares, _) in sums.items():
            if not np.isfinite(squares).all():
                raise BadRow(
                    f"row {captured.row.id}: values of layer {layer} are too large: the sum of their squares is infinite; reject the row"
                )
        self._failed = True  # until the row is complete
        self._append_row(captured)
        for layer, (squares, tokens) in sums.items():
            self._sumsq[layer] += squares
            self._sumsq_tokens[layer] += tokens
        self._failed = False

    def reject(self, reject: Reject) -> None:
        """Record that a planned row was not done, and why."""
        if reject.id is None:
            raise UserError(f"a reject without a row id ({reject.reason}) cannot be recorded in a part; give it its row's id")
        self._check_id(reject.id)
        self._ids.add(reject.id)
        self._rejects[reject.id] = reject.reason

    def seal(self) -> dict[str, Any]:
        """Finish the arrays, write `part.json` and rename the folder to its final name. Returns the content of `part.json`."""
        if self._failed:
            raise UserError(
                f"{self.folder.name}: it was sealed, or writing failed before, so its arrays are incomplete; dump the unit again"
            )
        self._failed = True  # a seal that was interrupted cannot be taken up again
        self._append_small_arrays()
        files = {"zarr.json": write_bytes(self._temporary / "zarr.json", json_bytes(GROUP_METADATA))}
        for name, array in self._arrays.items():
            array.close()
            fsync_path(array.folder)
            files |= {f"{name}/{file}": record for file, record in array.files.items()}
        content = self._content(files)
        write_bytes(self._temporary / PART_JSON, json_bytes(content))
        fsync_path(self._temporary)
        self._publish()
        return content

    def _check_id(self, name: str) -> None:
        if not name:
            raise BadRow("a row has an empty id; every row needs an id of its own")
        if name in self._ids:
            raise BadRow(f"row {name} was added or rejected before in {self.folder.name}; each id may come once")

    def _append_row(self, captured: CapturedRow) -> None:
        row, length = captured.row, len(captured.row.input_ids)
        mask = row.loss_mask  # [T]
        kept = last_positions(row.turns, length)  # [T_last]
        self._ids.add(row.id)
        self._arrays["input_ids"].append(row.input_ids)
        self._arrays["loss_mask"].append(mask)
        self._arrays["turns"].append(np.array(row.turns, np.int64).reshape(-1, 2))
        for layer, states in captured.aux.items():
            self._arrays[layer_name(layer)].append(states)
        self._arrays["last"].append(captured.last[kept])
        self._offsets.append(self._offsets[-1] + length)
        self._turn_offsets.append(self._turn_offsets[-1] + len(row.turns))
        self._last_offsets.append(self._last_offsets[-1] + len(kept))
        self._token_counts += np.bincount(row.input_ids[mask > 0], minlength=self.spec.vocab_size)
        self._rows.append(
            {"id": row.id, "source": row.source, "tokens": length, "supervised": row.supervised, "finish_reasons": list(row.finish_reasons)}
        )

    def _append_small_arrays(self) -> None:
        self._arrays["offsets"].append(np.array(self._offsets, np.int64))
        self._arrays["turn_offsets"].append(np.array(self._turn_offsets, np.int64))
        self._arrays["last_offsets"].append(np.array(self._last_offsets, np.int64))
        self._arrays["token_counts"].append(self._token_counts)
        for layer, squares in self._sumsq.items():
            self._arrays[f"sumsq_{layer_name(layer)}"].append(squares)

    def _content(self, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        counts = {
            "rows": len(self._rows),
            "rejected": len(self._rejects),
            "tokens": self._offsets[-1],
            "supervised": sum(row["supervised"] for row in self._rows),
            "last": self._last_offsets[-1],
            "stored_bytes": sum(record["bytes"] for record in files.values()),
        }
        content = {
            "format_version": FORMAT_VERSION,
            "unit": self.unit,
            "split": self.split,
            "spec": self.spec.to_dict(),
            "counts": counts,
            "sumsq_tokens": {layer_name(layer): tokens for layer, tokens in self._sumsq_tokens.items()},
            "rows": self._rows,
            "rejects": [{"id": name, "reason": reason} for name, reason in self._rejects.items()],
            "files": files,
        }
        return with_digest(content)

    def _publish(self) -> None:
        try:
            os.rename(self._temporary, self.folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise PartExists(self.folder) from None
            raise
        fsync_path(self.folder.parent)


# ---------------------------------------------------------------------------------------------------------------------
# Checks and statistics of one row


def check_row(captured: CapturedRow, spec: DumpSpec, split: str) -> None:
    """Raise BadRow where a captured row is not what the spec and split say."""
    row, length = captured.row, len(captured.row.input_ids)

    def bad(text: str) -> BadRow:
        return BadRow(f"row {row.id}: {text}; reject the row, or mend what captured it")

    if row.split != split:
        raise bad(f"split is {row.split!r}, its part holds {split!r} rows")
    if row.input_ids.dtype != np.int32 or row.input_ids.ndim != 1:
        raise bad(f"input_ids are {row.input_ids.dtype} {list(row.input_ids.shape)}, expected int32 [T]")
    if not 1 <= length <= spec.max_length:
        raise bad(f"it has {length} tokens, expected 1 to {spec.max_length}")
    if row.input_ids.min() < 0 or row.input_ids.max() >= spec.vocab_size:
        raise bad(f"token ids reach from {row.input_ids.min()} to {row.input_ids.max()}, expected 0 to {spec.vocab_size - 1}")
    if len(row.finish_reasons) != len(row.turns):
        raise bad(f"it has {len(row.finish_reasons)} finish reasons for {len(row.turns)} turns")
    if sorted(captured.aux) != list(spec.layers):
        raise bad(f"it has layers {sorted(captured.aux)}, expected {list(spec.layers)}")
    for name, states in [*((f"layer {layer}", captured.aux[layer]) for layer in spec.layers), ("the last state", captured.last)]:
        if states.shape != (length, spec.hidden_size) or states.dtype != spec.storage_dtype:
            raise bad(f"{name} is {states.dtype} {list(states.shape)}, expected {spec.storage_dtype} [{length}, {spec.hidden_size}]")
        if not all_finite(states, spec.dtype):
            raise bad(f"{name} has values that are infinite or not a number")


def all_finite(states: np.ndarray, dtype: str) -> bool:
    """Whether no value is infinite or not a number, from the bits of its exponent."""
    exponent = _EXPONENT[dtype]
    bits = np.ascontiguousarray(states).view(f"u{states.dtype.itemsize}")
    return not ((bits & bits.dtype.type(exponent)) == exponent).any()


def to_float32(states: np.ndarray, dtype: str) -> np.ndarray:
    """[T, H] storage dtype -> [T, H] float32, exactly."""
    if dtype == "bfloat16":
        return (states.astype(np.uint32) << 16).view(np.float32)
    return states.astype(np.float32, copy=False)


def channel_squares(states: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """([H] float64 sums of squares, number of tokens), leaving out outlier tokens of the row."""
    with np.errstate(over="ignore"):
        squares = np.square(to_float32(states, dtype))  # [T, H]
        norms = np.sqrt(squares.sum(1, dtype=np.float64))  # [T]
    kept = norms <= OUTLIER_FACTOR * np.median(norms)  # [T]
    return squares[kept].sum(0, dtype=np.float64), int(kept.sum())
