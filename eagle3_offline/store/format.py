"""The disk format of a dump, defined here and nowhere else; FORMAT.md beside it explains it without code.

Legend: T tokens, H hidden size, V vocabulary size, N rows, S supervised turns, L captured layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..records import STORAGE_DTYPE, UserError, turn_of_token
from ..runs import digest, unit_name

FORMAT_VERSION = 1
CODECS = ("lossless", "none")
LAYER_CONVENTION = "boundary"  # layer b is the residual stream entering decoder layer b; 0 is the embedding's output
LAST_NORM = "post"  # `last` is stored after the target's final norm: it is what lm_head reads

CHUNK_BYTES = 512 << 10  # raw bytes of one inner chunk: what a reader decodes at least
SHARD_BYTES = 64 << 20  # raw bytes of one shard file at most
BLOSC_BLOCK_BYTES = 1 << 20  # one Blosc block per chunk: better ratio, and file bytes that no thread count changes
OUTLIER_FACTOR = 8.0  # tokens whose norm is above this many medians of their row are left out of sumsq

MANIFEST, ROWS, STATISTICS, TARGET = "dump.json", "rows.safetensors", "statistics.safetensors", "target"
PART_JSON = "part.json"
GROUP_METADATA = {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def part_folder(dump: Path, unit: int) -> Path:
    return Path(dump) / "parts" / unit_name(unit)


def layer_name(layer: int) -> str:
    """The array that holds boundary `layer`: h02, h15, h100."""
    return f"h{layer:02d}"


def json_bytes(value: Any) -> bytes:
    """The one way JSON is written here, so that equal content has equal digests."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
    """`value` and, under "digest", the digest of all the rest: `dump.json` and `part.json` vouch for themselves."""
    return {**value, "digest": digest(value)}


def read_with_digest(path: Path) -> dict[str, Any]:
    """The content of an existing `dump.json` or `part.json`, of our version and undamaged."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it is damaged: restore it, or make it again") from None
    check_version(value.get("format_version"), path)
    found, wanted = value.get("digest"), digest({key: part for key, part in value.items() if key != "digest"})
    if found != wanted:
        raise UserError(f"{path} says that its digest is {found}, expected {wanted}; it is damaged: restore it, or make it again")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What a dump holds


@dataclass(frozen=True)
class DumpSpec:
    """What every part of a dump has in common. Parts with different specs never mix."""

    layers: tuple[int, ...]  # captured boundaries, ascending
    hidden_size: int
    vocab_size: int
    dtype: str  # bfloat16, float16 or float32: as the engine ran, never cast
    codec: str  # lossless or none
    target: dict[str, Any]  # fingerprint of the target: plain JSON
    engine: dict[str, Any]  # what ran it, with its version: plain JSON
    max_length: int  # longest row in tokens
    conversation: dict[str, Any]  # system prompt, sampling settings, ...: plain JSON

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPE:
            raise UserError(f"dtype is {self.dtype!r}; expected one of {', '.join(STORAGE_DTYPE)}")
        if self.codec not in CODECS:
            raise UserError(f"codec is {self.codec!r}; expected one of {', '.join(CODECS)}")
        for name in ("hidden_size", "vocab_size", "max_length"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UserError(f"{name} is {value!r}; expected a whole number above 0")
        self._check_layers()
        for name in ("target", "engine", "conversation"):
            _check_plain_json(name, getattr(self, name))

    def _check_layers(self) -> None:
        layers = self.layers
        if not isinstance(layers, tuple) or not layers or any(type(layer) is not int or layer < 0 for layer in layers):
            raise UserError(f"layers are {layers!r}; expected a tuple of one or more boundary indices from 0")
        if list(layers) != sorted(set(layers)):
            raise UserError(f"layers are {list(layers)}; expected each once and in ascending order: {sorted(set(layers))}")

    @property
    def storage_dtype(self) -> np.dtype:
        return STORAGE_DTYPE[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**_FIXED, **values, "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> DumpSpec:
        expected = {*_FIXED, *(field.name for field in fields(cls))}
        check_version(value.get("format_version"), "the dump's spec")
        if missing := sorted(expected - set(value)):
            raise UserError(f"the dump's spec lacks {', '.join(missing)}; it was changed or damaged: restore it")
        if unknown := sorted(set(value) - expected):
            raise UserError(f"the dump's spec has unknown keys {', '.join(unknown)}; it needs a newer eagle3-offline, or was changed")
        for name, fixed in _FIXED.items():
            if value[name] != fixed:
                raise UserError(f"the dump's spec has {name} = {value[name]!r}; this program reads {fixed!r} only")
        values = {name: value[name] for name in expected - set(_FIXED)}
        return cls(**{**values, "layers": tuple(value["layers"])})


_FIXED = {"format_version": FORMAT_VERSION, "layer_convention": LAYER_CONVENTION, "last_norm": LAST_NORM}


def check_version(found: Any, where: Path | str) -> None:
    if found != FORMAT_VERSION:
        raise UserError(f"{where} has format version {found!r}; this program reads version {FORMAT_VERSION}: use the release that wrote it")


def check_same_spec(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a part whose spec (as dict) is not the dump's."""
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if keys:
        changes = "; ".join(f"{key} is {found.get(key)!r}, expected {wanted.get(key)!r}" for key in keys)
        raise UserError(f"{where} was dumped with other settings: {changes}. Remove it and dump its unit again")


def _check_plain_json(name: str, value: Any) -> None:
    try:
        same = isinstance(value, dict) and json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise UserError(f"{name} is {value!r}; expected a dict of plain JSON values (text keys, lists instead of tuples, no NaN)")


def last_positions(turns: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    """[T_last] int64: the tokens t whose last state is stored: m[t-1], m[t] or m[t+1] is 1.

    token   a b c d e f g h
    mask    0 0 0 1 1 0 0 0
    stored  . . c d e f . .
    """
    mask = turn_of_token(tuple(turns), length) > 0  # [T]
    near = mask.copy()
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    return np.flatnonzero(near).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays of a part


@dataclass(frozen=True)
class Layout:
    """How one array lies on disk, but for its length. All arrays grow along their first axis."""

    row_shape: tuple[int, ...]  # shape of one entry: (H,) for hidden states, () for token ids
    dtype: np.dtype
    codec: str
    logical_dtype: str | None = None  # "bfloat16" where uint16 carries its bits
    chunk_rows: int = 0  # entries in an inner chunk
    chunks_per_shard: int = 0

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize

    def sized(self, chunk_bytes: int, shard_bytes: int) -> Layout:
        """Inner chunks of at most `chunk_bytes` raw (one entry at least), whole chunks of at most `shard_bytes` in a shard."""
        chunk_rows = max(1, chunk_bytes // self.row_bytes)
        return replace(self, chunk_rows=chunk_rows, chunks_per_shard=max(1, shard_bytes // (chunk_rows * self.row_bytes)))


def part_layouts(spec: DumpSpec, chunk_bytes: int = CHUNK_BYTES, shard_bytes: int = SHARD_BYTES) -> dict[str, Layout]:
    """Name -> layout of every array of a part."""

    def plain(dtype: str, *row_shape: int) -> Layout:
        return Layout(row_shape, np.dtype(dtype), spec.codec).sized(chunk_bytes, shard_bytes)

    logical = spec.dtype if spec.dtype == "bfloat16" else None
    hidden = Layout((spec.hidden_size,), spec.storage_dtype, spec.codec, logical).sized(chunk_bytes, shard_bytes)
    names = [layer_name(layer) for layer in spec.layers]
    return {
        "input_ids": plain("int32"),  # [T]
        "loss_mask": plain("uint8"),  # [T]
        "offsets": plain("int64"),  # [N+1] row i is tokens offsets[i]:offsets[i+1]
        "turns": plain("int64", 2),  # [S, 2] start and end within the row
        "turn_offsets": plain("int64"),  # [N+1]
        **{name: hidden for name in names},  # [T, H]
        "last": hidden,  # [T_last, H]
        "last_offsets": plain("int64"),  # [N+1]
        "token_counts": plain("int64"),  # [V]
        **{f"sumsq_{name}": plain("float64") for name in names},  # [H]
    }


def array_metadata(layout: Layout, length: int) -> dict[str, Any]:
    """The array's `zarr.json` (Zarr v3, core codecs only)."""
    chunk_shape = [layout.chunk_rows, *layout.row_shape]
    shard_shape = [layout.chunk_rows * layout.chunks_per_shard, *layout.row_shape]
    little, crc32c = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    sharding = {
        "chunk_shape": chunk_shape,
        "codecs": [little, *_compression(layout), crc32c],
        "index_codecs": [little, crc32c],
        "index_location": "end",
    }
    return {
        "shape": [length, *layout.row_shape],
        "data_type": layout.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if layout.dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"logical_dtype": layout.logical_dtype} if layout.logical_dtype else {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _compression(layout: Layout) -> list[dict[str, Any]]:
    if layout.codec == "none":
        return []
    configuration = {"typesize": layout.dtype.itemsize, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": BLOSC_BLOCK_BYTES}
    return [{"name": "blosc", "configuration": configuration}]


def layout_from_metadata(metadata: Any, expected: Layout, path: Path) -> tuple[Layout, int]:
    """Chunk sizes and length of an existing array; everything else must be as this format writes it."""
    try:
        length = metadata["shape"][0]
        chunk_rows = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
        shard_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        layout = replace(expected, chunk_rows=chunk_rows, chunks_per_shard=shard_rows // chunk_rows)
        wanted = array_metadata(layout, length)
    except (LookupError, TypeError, ZeroDivisionError):
        raise UserError(f"{path} describes no array of this format; restore the part, or remove it and dump its unit again") from None
    if metadata != wanted:
        keys = ", ".join(key for key in sorted({*metadata, *wanted}) if metadata.get(key) != wanted.get(key))
        raise UserError(f"{path} differs from what this format writes in {keys}; restore the part, or remove it and dump its unit again")
    return layout, length


def shard_file(layout: Layout, shard: int) -> str:
    """File name of a shard inside its array's folder: c.3.0 for [T, H], c.3 for [T]."""
    return ".".join(["c", str(shard), *("0" for _ in layout.row_shape)])
