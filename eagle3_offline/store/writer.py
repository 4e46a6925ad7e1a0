"""Writes one part: rows as they come, in bounded memory, published by one rename.

Legend: T tokens, H hidden size, C channels of all captured states, V vocabulary, N rows.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..records import SPLITS, CapturedRow, Reject, TopLogits, UserError
from ..runs import fsync_path, unit_name
from .arrays import ArrayWriter
from .files import write_bytes
from .format import (
    FORMAT_VERSION,
    GROUP_METADATA,
    PART_JSON,
    DumpSpec,
    Sizes,
    json_bytes,
    last_positions,
    plain_layouts,
    state_layouts,
    with_digest,
)
from .numeric import all_finite, channel_squares, outlier_tokens
from .places import LocalPlace, ObjectPlace, Place, place
from .states import StateWriter


class BadRow(UserError):
    """A row that cannot be stored. Nothing of it was recorded; reject it and go on."""


class PartExists(UserError):
    """The unit's part is sealed already."""

    def __init__(self, folder: Place):
        super().__init__(
            f"{folder} exists already: a sealed part is never written again. Skip its unit, or remove the folder to dump it anew"
        )


class PartWriter:
    """Context manager around one part of a dump. Leaving it without `seal` removes everything it wrote. One thread only.

    `threads` encode beside it, with at most a few chunks of each array in memory; the bytes do not depend on their number.
    """

    def __init__(
        self,
        dump: Place | Path | str,
        unit: int,
        split: str,
        spec: DumpSpec,
        *,
        scratch: Path | None = None,
        threads: int = 0,
        sizes: Sizes = Sizes(),  # noqa: B008  frozen
    ):
        """scratch: local folder where a part for object storage is built before it is sent."""
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        self.unit, self.split, self.spec = unit, split, spec
        self.folder = place(dump) / "parts" / unit_name(unit)
        self._data = data_name(self.folder)
        self._temporary = _local_parent(self.folder, scratch) / f".{unit_name(unit)}.{socket.gethostname()}.{os.getpid()}.tmp"
        self._pool = ThreadPoolExecutor(threads, "store-encode") if threads else None
        self._waiting = threads + 1
        self._sizes = sizes
        self._rows: list[dict[str, Any]] = []
        self._rejects: dict[str, str] = {}  # id -> reason
        self._ids: set[str] = set()
        self._offsets, self._turn_offsets, self._last_offsets = [0], [0], [0]
        self._token_counts = np.zeros(spec.vocab_size, np.int64)  # [V]
        self._sumsq = {name: np.zeros(spec.aux_width, np.float64) for name in spec.aux_arrays}
        self._sumsq_tokens = dict.fromkeys(spec.aux_arrays, 0)
        self._failed = False

    def __enter__(self) -> PartWriter:
        if (self.folder / PART_JSON).size() is not None:
            raise PartExists(self.folder)
        if self.folder.sizes():
            raise UserError(
                f"{self.folder} is there without its {PART_JSON}, so it is damaged: drop it with `store repair`, then run again"
            )
        shutil.rmtree(self._temporary, ignore_errors=True)  # of a dead process with our host and pid
        with self._storing():
            self._temporary.mkdir(parents=True)
        self._plain = {
            name: ArrayWriter(self._temporary / name, layout, self._pool, self._waiting)
            for name, layout in plain_layouts(self.spec, self._sizes).items()
        }
        self._states = {
            name: StateWriter(self._temporary, name, layout, self._pool, self._waiting)
            for name, layout in state_layouts(self.spec, self._sizes).items()
        }
        return self

    def __exit__(self, *_: object) -> None:
        for array in (*self._plain.values(), *self._states.values()):
            array.abandon()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self._temporary, ignore_errors=True)  # renamed away by seal

    def add(self, captured: CapturedRow) -> None:
        """Append a row. Raises BadRow, before anything is recorded, when it is not what the spec says."""
        self._check_id(captured.row.id)
        check_row(captured, self.spec, self.split)
        width = self.spec.aux_width
        pieces = {name: captured.aux[:, n * width : (n + 1) * width] for n, name in enumerate(self.spec.aux_arrays)}
        outliers = {name: outlier_tokens(states, self.spec.dtype) for name, states in pieces.items()}
        sums = {name: channel_squares(states, self.spec.dtype, outliers[name]) for name, states in pieces.items()}
        for name, squares in sums.items():
            if not np.isfinite(squares).all():
                raise BadRow(f"row {captured.row.id}: values of {name} are too large: the sum of their squares is infinite; reject the row")
        self._failed = True  # until the row is complete
        with self._storing():
            self._append_row(captured)
            for name, states in pieces.items():
                self._states[name].append(states, outliers[name])
        for name, squares in sums.items():
            self._sumsq[name] += squares
            self._sumsq_tokens[name] += int((~outliers[name]).sum())
        self._failed = False

    def reject(self, reject: Reject) -> None:
        """Record that a planned row was not done, and why."""
        if reject.id is None:
            raise UserError(f"a reject without a row id ({reject.reason}) cannot be recorded in a part; give it its row's id")
        self._check_id(reject.id)
        self._ids.add(reject.id)
        self._rejects[reject.id] = reject.reason

    def seal(self) -> dict[str, Any]:
        """Finish the arrays, write `part.json` and publish the part under its final name. Returns the content of `part.json`."""
        if self._failed:
            raise UserError(f"{self.folder}: it was sealed, or writing failed before, so its arrays are incomplete; dump the unit again")
        self._failed = True  # a seal that was interrupted cannot be taken up again
        with self._storing():
            files = self._finish_arrays()
            content = self._content(files)
            write_bytes(self._temporary / PART_JSON, json_bytes(content))
            fsync_path(self._temporary)
            self._check_files(files)
            publish(self._temporary, self.folder, self._data)
        return content

    def _finish_arrays(self) -> dict[str, dict[str, Any]]:
        """Path in the part -> record of every file."""
        self._append_small_arrays()
        files = {"zarr.json": write_bytes(self._temporary / "zarr.json", json_bytes(GROUP_METADATA))}
        for array in (*self._plain.values(), *self._states.values()):
            array.close()
        arrays = [*self._plain.values(), *(each for states in self._states.values() for each in states.arrays.values())]
        for array in arrays:
            fsync_path(array.folder)
            files |= {f"{array.folder.name}/{file}": record for file, record in array.files.items()}
        return files

    def _check_files(self, files: dict[str, dict[str, Any]]) -> None:
        """What was written must still be there, all of it: another hand may have been at the unfinished folder."""
        there = LocalPlace(self._temporary).sizes()
        for name, record in files.items():
            if there.get(name) != record["bytes"]:
                raise FileNotFoundError(errno.ENOENT, "missing or short", str(self._temporary / name))

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """A disk's error says no more than `No space left on device`: add which part, and what to do."""
        try:
            yield
        except OSError as error:
            text, number = error.strerror or str(error), error.errno
            if isinstance(error, FileNotFoundError):
                text, number = "what was written of it has vanished", errno.ESTALE
            text = f"{text}: {self.folder} was not published; mend this and run the same command again"
            raise OSError(number, text, error.filename or str(self._temporary)) from error

    def _check_id(self, name: str) -> None:
        if not name:
            raise BadRow("a row has an empty id; every row needs an id of its own")
        if name in self._ids:
            raise BadRow(f"row {name} was added or rejected before in {self.folder.name}; each id may come once")

    def _append_row(self, captured: CapturedRow) -> None:
        """Everything of a row but its captured states."""
        row, mask = captured.row, captured.row.loss_mask  # [T]
        self._ids.add(row.id)
        self._plain["input_ids"].append(row.input_ids)
        self._plain["loss_mask"].append(mask)
        self._plain["turns"].append(np.array(row.turns, np.int64).reshape(-1, 2))
        if captured.last is not None:
            self._states["last"].append(captured.last, outlier_tokens(captured.last, self.spec.dtype))
        teachers = self._append_top(captured.top) if captured.top is not None else len(captured.last)
        self._offsets.append(self._offsets[-1] + len(row.input_ids))
        self._turn_offsets.append(self._turn_offsets[-1] + len(row.turns))
        self._last_offsets.append(self._last_offsets[-1] + teachers)
        self._token_counts += np.bincount(row.input_ids[mask > 0], minlength=self.spec.vocab_size)
        self._rows.append(
            {
                "id": row.id,
                "source": row.source,
                "tokens": len(mask),
                "supervised": row.supervised,
                "finish_reasons": list(row.finish_reasons),
            }
        )

    def _append_top(self, top: TopLogits) -> int:
        self._plain["top_ids"].append(top.ids.astype(self._plain["top_ids"].dtype))
        self._plain["top_log_probs"].append(top.log_probs)
        self._plain["log_normaliser"].append(top.log_normaliser)
        return len(top.ids)

    def _append_small_arrays(self) -> None:
        self._plain["offsets"].append(np.array(self._offsets, np.int64))
        self._plain["turn_offsets"].append(np.array(self._turn_offsets, np.int64))
        self._plain["last_offsets"].append(np.array(self._last_offsets, np.int64))
        self._plain["token_counts"].append(self._token_counts)
        for name, squares in self._sumsq.items():
            self._plain[f"sumsq_{name}"].append(squares)

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
            "data": self._data,
            "spec": self.spec.to_dict(),
            "counts": counts,
            "sumsq_tokens": self._sumsq_tokens,
            "rows": self._rows,
            "rejects": [{"id": name, "reason": reason} for name, reason in self._rejects.items()],
            "files": files,
        }
        return with_digest(content)


def _local_parent(folder: Place, scratch: Path | None) -> Path:
    """Where a part is built: beside its final name, so that a rename publishes it; for object storage in scratch."""
    if isinstance(folder, ObjectPlace):
        if scratch is None:
            raise UserError(f"a part of {folder} is built in a local folder before it is sent: none was given as scratch")
        return scratch
    return folder.path.parent


def data_name(folder: Place) -> str | None:
    """The folder beside a part in object storage that holds its arrays: one of its own for each attempt, so that two that race
    never mix. None where the part's folder itself holds them."""
    return f"{folder.name}.{secrets.token_hex(4)}" if isinstance(folder, ObjectPlace) else None


def publish(temporary: Path, folder: Place, data: str | None) -> None:
    """Give a finished part its final name, once: PartExists where it is there. In object storage `part.json` is sent last."""
    if isinstance(folder, ObjectPlace):
        for file in sorted(temporary.rglob("*")):
            if file.is_file() and file != temporary / PART_JSON:
                (folder.parent / data / file.relative_to(temporary).as_posix()).upload(file)
        _create_part_json(folder, data, (temporary / PART_JSON).read_bytes())
        return
    try:
        os.rename(temporary, folder.path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise PartExists(folder) from None
        raise
    fsync_path(folder.path.parent)


def _create_part_json(folder: Place, data: str, content: bytes) -> None:
    """Send `part.json`, or remove the arrays of an attempt that lost against another."""
    try:
        (folder / PART_JSON).create(content)
    except FileExistsError:
        if (folder / PART_JSON).read() == content:
            return  # it is ours: the client repeated a request whose answer was lost
        (folder.parent / data).remove()
        raise PartExists(folder) from None


# ---------------------------------------------------------------------------------------------------------------------
# Checks of one row


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
    if text := _wrong_states(captured, spec, len(last_positions(row.turns, length))):
        raise bad(text)


def _wrong_states(captured: CapturedRow, spec: DumpSpec, teachers: int) -> str | None:
    """What is wrong with a row's states, or with its teachers."""
    wanted = [("the captured states", captured.aux, len(captured.row.input_ids), spec.aux_channels)]
    if spec.compact is None:
        wanted.append(("the last states", captured.last, teachers, spec.hidden_size))
    for name, states, tokens, channels in wanted:
        if states is None or states.shape != (tokens, channels) or states.dtype != spec.storage_dtype:
            found = "missing" if states is None else f"{states.dtype} {list(states.shape)}"
            return f"{name} are {found}, expected {spec.storage_dtype} [{tokens}, {channels}]"
        if not all_finite(states, spec.dtype):
            return f"{name} have values that are infinite or not a number"
    if spec.compact is None:
        return None if captured.top is None else "it has top logits, but the dump is not compact"
    return _wrong_top(captured, spec, teachers)


def _wrong_top(captured: CapturedRow, spec: DumpSpec, teachers: int) -> str | None:
    top, k = captured.top, spec.compact.top_k
    if top is None or captured.last is not None:
        return "a compact dump needs its top logits, and no last states"
    if top.ids.shape != (teachers, k) or top.log_probs.shape != (teachers, k) or top.log_normaliser.shape != (teachers,):
        return f"its top logits are {list(top.ids.shape)}, {list(top.log_probs.shape)}, expected [{teachers}, {k}]"
    if top.log_probs.dtype != np.float16 or top.log_normaliser.dtype != np.float32:
        return f"its top logits are {top.log_probs.dtype} and {top.log_normaliser.dtype}, expected float16 and float32"
    if teachers and not (0 <= top.ids.min() and top.ids.max() < spec.vocab_size):
        return f"its top logits' ids reach from {top.ids.min()} to {top.ids.max()}, expected 0 to {spec.vocab_size - 1}"
    if not (np.isfinite(top.log_probs).all() and np.isfinite(top.log_normaliser).all()):
        return "its top logits have values that are infinite or not a number"
    return None
