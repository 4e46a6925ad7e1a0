"""Opens a sealed dump and reads its rows. Legend: T tokens, H hidden size, V vocabulary size, N rows of the dump."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..records import SPLITS, Sample, UserError
from .arrays import Shard
from .files import MEND, check, read_tensors, tensor_dtypes
from .format import MANIFEST, ROWS, STATISTICS, TARGET, DumpSpec, layer_name, read_with_digest
from .part import Part
from .target_files import TENSORS

OPEN_SHARDS = 256  # shard files that one opened dump keeps open at most

_LARGE = (f"{TARGET}/{TENSORS}",)  # digested when first used, not when the dump is opened


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of `dump.json`."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a sealed dump: run `eagle3-offline store seal`, or name another folder")
    return read_with_digest(file)


class Dump:
    """A sealed dump. `Dump.open` reads the manifest and the row table; parts are opened as rows of them are asked for.

    Safe to share between threads, to use after a fork, and to pickle (a copy opens the dump again).
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], rows: Mapping[str, np.ndarray]):
        self.path = path
        self.manifest = manifest
        self.spec = DumpSpec.from_dict(manifest["spec"])
        self.lengths = rows["length"]  # [N] int32 tokens
        self.supervised = rows["supervised"]  # [N] int32 tokens that the target generated
        self.splits = rows["split"]  # [N] uint8: 0 train, 1 eval
        self.parts = rows["part"]  # [N] int32 index into manifest["parts"]
        self.sources = rows["source"]  # [N] int32 index into manifest["sources"]
        self._rows = rows
        # C-implemented caches need no lock of ours, so a fork never finds one held; opening a part twice does no harm.
        self._open_shard = lru_cache(OPEN_SHARDS)(Shard)
        self._part = lru_cache(None)(self._open_part)

    @classmethod
    def open(cls, path: Path | str) -> Dump:
        """Open a dump; raises UserError for another version, missing files, or files that differ from the manifest."""
        path = Path(path)
        manifest = read_manifest(path)
        for name, record in manifest["files"].items():
            check(path / name, record, sizes_only=name in _LARGE)
        return cls(path, manifest, read_tensors(path / ROWS))

    def __reduce__(self) -> tuple[Any, ...]:
        return Dump.open, (str(self.path),)

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

    def sample(self, i: int, layers: Iterable[int] | None = None) -> Sample:
        """One row with the hidden states of `layers` (None: all that the dump has); other layers are not read."""
        wanted = self.spec.layers if layers is None else tuple(layers)
        if unknown := [layer for layer in wanted if layer not in self.spec.layers]:
            raise UserError(
                f"layers {unknown} are not in {self.path}, which has {list(self.spec.layers)}; choose among these, or dump again"
            )
        return self._read(i, lambda part, row: part.sample(row, self.ids(i), wanted))

    def turns(self, i: int) -> tuple[tuple[int, int], ...]:
        """The row's supervised ranges [start, end), counted from its first token."""
        return self._read(i, lambda part, row: part.turns_of(row))

    def input_ids(self, i: int) -> np.ndarray:
        """[T] int32"""
        return self._read(i, lambda part, row: part.input_ids(row))

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """Of the train split: `token_counts` [V] int64 of generated tokens, and each layer's `rms_hXX` [H] float32."""
        stored = read_tensors(self.path / STATISTICS)
        result = {"token_counts": np.array(stored["token_counts"])}
        for name, tokens in zip(map(layer_name, self.spec.layers), stored["sumsq_tokens"].tolist(), strict=True):
            if tokens == 0:
                raise UserError(f"{self.path} has no train tokens in {name}, so its channels have no rms; seal it with train rows")
            result[f"rms_{name}"] = np.sqrt(stored[f"sumsq_{name}"] / tokens).astype(np.float32)
        return result

    @property
    def target_folder(self) -> Path:
        """Folder with the target's config, tokenizer, chat template and `target.safetensors`."""
        return self.path / TARGET

    def target_tensors(self) -> dict[str, np.ndarray]:
        """Name -> read-only array in storage dtype (bfloat16 as uint16), verified against the manifest once."""
        return dict(self._target)

    def target_dtypes(self) -> dict[str, str]:
        """Name -> logical dtype of the target's tensors."""
        return tensor_dtypes(self.target_folder / TENSORS)

    @cached_property
    def _target(self) -> dict[str, np.ndarray]:
        check(self.target_folder / TENSORS, self.manifest["files"][f"{TARGET}/{TENSORS}"])
        return read_tensors(self.target_folder / TENSORS)

    def _read(self, i: int, read: Any) -> Any:
        """Apply `read(part, row in part)`; an error names the row."""
        if not 0 <= i < len(self):
            raise UserError(f"row {i} is not in {self.path}, which has rows 0 to {len(self) - 1}")
        try:
            part, row = self._part(int(self.parts[i])), int(self._rows["row"][i])
            found = part.offsets[row : row + 2].tolist()
            start = int(self._rows["token_offset"][i])
            if found != [start, start + int(self.lengths[i])]:
                raise UserError(f"{part.folder} has it at tokens {found}, {ROWS} at {start} with {self.lengths[i]}: {MEND}")
            return read(part, row)
        except UserError as error:
            raise UserError(f"row {i} ({self.ids(i)}): {error}") from None

    def _open_part(self, number: int) -> Part:
        entry = self.manifest["parts"][number]
        return Part(self.path / "parts" / entry["name"], self.spec, entry["part_json"], self._open_shard)
