"""The disk format of a dump, defined here and nowhere else; FORMAT.md beside it explains it without code.

Legend: T tokens, H hidden size, V vocabulary size, N rows, S supervised turns, r rank and k logits of a compact dump.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..records import STORAGE_DTYPE, UserError, turn_of_token
from ..runs import digest

FORMAT_VERSION = 2  # 1 had no lossy codecs and no compact dumps
EXACT_CODECS = ("lossless", "lossless-fast", "none")
LOSSY_CODECS = ("int8", "fp8", "bitround")
CODECS = EXACT_CODECS + LOSSY_CODECS
LAYER_CONVENTION = "boundary"  # layer b is the residual stream entering decoder layer b; 0 is the embedding's output
LAST_NORM = "post"  # `last` is stored after the target's final norm: it is what lm_head reads

# Raw bytes of one inner chunk of states: what a reader decodes at least. zstd codes 128 KiB at a time, so a chunk has to be a multiple
# of that for each byte plane, or two planes share a table: 288 KiB give a ratio of 1.48 where 512 KiB give 1.58.
CHUNK_BYTES = 512 << 10
TOKEN_CHUNK_BYTES = 32 << 10  # of token ids and the other small arrays
SCALE_CHUNKS = 1024  # chunks in a shard of int8's scales, one row each: the index of a shard has an entry for every one it could hold
SHARD_BYTES = 64 << 20  # raw bytes of one shard file at most
BLOSC_BLOCK_BYTES = 1 << 20  # one Blosc block per chunk: better ratio, and file bytes that no thread count changes
OUTLIER_FACTOR = 8.0  # tokens whose norm is above this many medians of their row: left out of sumsq, kept exactly by lossy codecs
COLUMN_TOLERANCE = 0.05  # a channel of a chunk whose rms error under a lossy codec is a larger share of its spread is kept exactly

MANIFEST, ROWS, STATISTICS, TARGET = "dump.json", "rows.safetensors", "statistics.safetensors", "target"
PART_JSON = "part.json"
GROUP_METADATA = {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def layer_name(layer: int) -> str:
    """The array that holds boundary `layer`: h02, h15, h100."""
    return f"h{layer:02d}"


def json_bytes(value: Any) -> bytes:
    """The one way JSON is written here, so that equal content has equal digests."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
    """`value` and, under "digest", the digest of all the rest: `dump.json` and `part.json` vouch for themselves."""
    return {**value, "digest": digest(value)}


def with_digest_checked(data: bytes, where: object) -> dict[str, Any]:
    """The value in the bytes of a `dump.json` or `part.json`, of our version and undamaged."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); it is damaged: restore it, or make it again") from None
    check_version(value.get("format_version") if isinstance(value, dict) else None, where)
    found, wanted = value.get("digest"), digest({key: part for key, part in value.items() if key != "digest"})
    if found != wanted:
        raise UserError(f"{where} says that its digest is {found}, expected {wanted}; it is damaged: restore it, or make it again")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What a dump holds


@dataclass(frozen=True)
class Compact:
    """How a compact dump reduces what the target gives: see FORMAT.md."""

    rank: int  # r, channels that the captured layers are projected to
    top_k: int  # k, logits that are kept of each teacher
    basis: str  # digest of target/basis.safetensors

    def __post_init__(self) -> None:
        for name in ("rank", "top_k"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UserError(f"compact {name} is {value!r}; expected a whole number above 0")


@dataclass(frozen=True)
class DumpSpec:
    """What every part of a dump has in common. Parts with different specs never mix."""

    layers: tuple[int, ...]  # captured boundaries, ascending
    hidden_size: int
    vocab_size: int
    dtype: str  # bfloat16, float16 or float32: as the engine ran, never cast
    codec: str  # of the captured layers, or of their projection: one of CODECS
    last_codec: str | None  # of the last states; None in a compact dump, which has none
    compact: Compact | None
    target: dict[str, Any]  # fingerprint of the target: plain JSON
    engine: dict[str, Any]  # what ran it, with its version: plain JSON
    max_length: int  # longest row in tokens
    conversation: dict[str, Any]  # system prompt, sampling settings, ...: plain JSON

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPE:
            raise UserError(f"dtype is {self.dtype!r}; expected one of {', '.join(STORAGE_DTYPE)}")
        if self.codec not in CODECS:
            raise UserError(f"codec is {self.codec!r}; expected one of {', '.join(CODECS)}")
        if self.compact is None and self.last_codec not in CODECS:
            raise UserError(f"last_codec is {self.last_codec!r}; expected one of {', '.join(CODECS)}")
        if self.compact is not None and self.last_codec is not None:
            raise UserError(f"last_codec is {self.last_codec!r}; a compact dump holds no last states: expected null")
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

    @property
    def aux_arrays(self) -> tuple[str, ...]:
        """The arrays that hold the captured states, in the order of their channels."""
        return tuple(map(layer_name, self.layers)) if self.compact is None else ("aux",)

    @property
    def aux_width(self) -> int:
        """Channels of one of `aux_arrays`: H, or r."""
        return self.hidden_size if self.compact is None else self.compact.rank

    @property
    def aux_channels(self) -> int:
        """C, channels of all captured states of a token."""
        return self.aux_width * len(self.aux_arrays)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        compact = None if self.compact is None else vars(self.compact)
        return {**_FIXED, **values, "layers": list(self.layers), "compact": compact}

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
        compact = None if value["compact"] is None else Compact(**value["compact"])
        return cls(**{**values, "layers": tuple(value["layers"]), "compact": compact})


_FIXED = {"format_version": FORMAT_VERSION, "layer_convention": LAYER_CONVENTION, "last_norm": LAST_NORM}


class OtherVersion(UserError):
    """Written by another release: not damaged."""


def check_version(found: Any, where: object) -> None:
    if found != FORMAT_VERSION:
        raise OtherVersion(
            f"{where} has format version {found!r}; this program reads version {FORMAT_VERSION}: use the release that wrote it"
        )


def check_same_spec(found: Mapping[str, Any], wanted: Mapping[str, Any], where: object) -> None:
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
    compression: str  # one of EXACT_CODECS
    attributes: tuple[tuple[str, str], ...] = ()  # as logical_dtype = bfloat16 where uint16 carries its bits
    whole_chunks: bool = False  # the last chunk is padded even where it is the only one
    chunk_rows: int = 0  # entries in an inner chunk
    chunks_per_shard: int = 0

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize

    def sized(self, chunk_rows: int, shard_bytes: int) -> Layout:
        """Inner chunks of `chunk_rows` entries, whole chunks of at most `shard_bytes` raw in a shard."""
        return replace(self, chunk_rows=chunk_rows, chunks_per_shard=max(1, shard_bytes // (chunk_rows * self.row_bytes)))


@dataclass(frozen=True)
class Sizes:
    """Raw bytes of chunks and shards. Other values than the defaults are for tests and measurements."""

    chunk_bytes: int = CHUNK_BYTES
    shard_bytes: int = SHARD_BYTES

    def state_rows(self, row_bytes: int) -> int:
        """Tokens in a chunk of states."""
        return max(1, self.chunk_bytes // row_bytes)

    def rows(self, row_bytes: int) -> int:
        """Entries in a chunk of any other array."""
        return max(1, min(TOKEN_CHUNK_BYTES, self.chunk_bytes) // row_bytes)


@dataclass(frozen=True)
class StateLayout:
    """Where states of one kind lie: the array itself, and what a lossy codec keeps beside it (companions, by suffix)."""

    codec: str
    dtype: str  # logical dtype of the states: what the reader gives
    main: Layout
    companions: Mapping[str, Layout]

    def arrays(self, name: str) -> dict[str, Layout]:
        """Array name -> layout."""
        return {name: self.main, **{f"{name}_{suffix}": layout for suffix, layout in self.companions.items()}}


def state_layout(codec: str, dtype: str, width: int, sizes: Sizes) -> StateLayout:
    """The arrays of states [T, width] under a codec."""
    storage = STORAGE_DTYPE[dtype]
    logical = (("logical_dtype", dtype),) if dtype == "bfloat16" else ()
    exact = Layout((width,), storage, "lossless", logical)
    if codec in EXACT_CODECS:
        main = replace(exact, compression=codec)
        return StateLayout(codec, dtype, main.sized(sizes.state_rows(main.row_bytes), sizes.shard_bytes), {})
    main = {
        "int8": Layout((width,), np.dtype("int8"), "lossless", (("codec", "int8"),), whole_chunks=True),
        "fp8": Layout((width,), np.dtype("uint8"), "lossless", (("codec", "fp8"), ("logical_dtype", "float8_e4m3fn")), whole_chunks=True),
        "bitround": replace(exact, attributes=(("codec", "bitround"), *logical), whole_chunks=True),
    }[codec]
    main = main.sized(sizes.state_rows(main.row_bytes), sizes.shard_bytes)
    scale = {
        "int8": {"scale": replace(Layout((width,), np.dtype("float32"), "lossless"), chunk_rows=1, chunks_per_shard=SCALE_CHUNKS)},
        "fp8": {"scale": _plain("float32", (), sizes)},  # [T]
        "bitround": {},
    }[codec]
    column = Layout((), storage, "lossless", logical)
    companions = {
        **scale,
        "token_at": _plain("int64", (), sizes),  # [E] tokens that are kept exactly, ascending
        "token": exact.sized(sizes.rows(exact.row_bytes), sizes.shard_bytes),  # [E, width]
        "column_at": _plain("int64", (2,), sizes),  # [F, 2] chunk and channel that are kept exactly, ascending
        "column": column.sized(sizes.rows(column.row_bytes), sizes.shard_bytes),  # [F * tokens of a chunk]
    }
    return StateLayout(codec, dtype, main, companions)


def _plain(dtype: str, row_shape: tuple[int, ...], sizes: Sizes) -> Layout:
    layout = Layout(row_shape, np.dtype(dtype), "lossless")
    return layout.sized(sizes.rows(layout.row_bytes), sizes.shard_bytes)


def state_layouts(spec: DumpSpec, sizes: Sizes = Sizes()) -> dict[str, StateLayout]:  # noqa: B008  frozen
    """Name -> layout of every kind of states: the captured ones, and `last`."""
    layouts = {name: state_layout(spec.codec, spec.dtype, spec.aux_width, sizes) for name in spec.aux_arrays}
    if spec.last_codec is not None:
        layouts["last"] = state_layout(spec.last_codec, spec.dtype, spec.hidden_size, sizes)
    return layouts


def plain_layouts(spec: DumpSpec, sizes: Sizes = Sizes()) -> dict[str, Layout]:  # noqa: B008  frozen
    """Name -> layout of every array of a part that holds no states."""
    teacher = {}
    if spec.compact is not None:
        ids = "uint16" if spec.vocab_size <= 1 << 16 else "uint32"
        teacher = {
            "top_ids": _plain(ids, (spec.compact.top_k,), sizes),  # [T_last, k]
            "top_log_probs": _plain("float16", (spec.compact.top_k,), sizes),  # [T_last, k]
            "log_normaliser": _plain("float32", (), sizes),  # [T_last]
        }
    return {
        "input_ids": _plain("int32", (), sizes),  # [T]
        "loss_mask": _plain("uint8", (), sizes),  # [T]
        "offsets": _plain("int64", (), sizes),  # [N+1] row i is tokens offsets[i]:offsets[i+1]
        "turns": _plain("int64", (2,), sizes),  # [S, 2] start and end within the row
        "turn_offsets": _plain("int64", (), sizes),  # [N+1]
        "last_offsets": _plain("int64", (), sizes),  # [N+1] of `last` or of the top logits
        **teacher,
        "token_counts": _plain("int64", (), sizes),  # [V]
        **{f"sumsq_{name}": _plain("float64", (), sizes) for name in spec.aux_arrays},  # [H], or [r]
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
        "attributes": dict(layout.attributes),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def blosc_settings(layout: Layout) -> dict[str, Any] | None:
    """The `blosc` codec's configuration as it stands in zarr.json; None where chunks are not compressed."""
    if layout.compression == "none":
        return None
    fast = layout.compression == "lossless-fast"
    return {
        "typesize": layout.dtype.itemsize,
        "cname": "lz4" if fast else "zstd",
        "clevel": 1,
        "shuffle": "bitshuffle" if fast else "shuffle",
        "blocksize": BLOSC_BLOCK_BYTES,
    }


def _compression(layout: Layout) -> list[dict[str, Any]]:
    settings = blosc_settings(layout)
    return [] if settings is None else [{"name": "blosc", "configuration": settings}]


def layout_from_metadata(metadata: Any, expected: Layout, where: object) -> tuple[Layout, int]:
    """Chunk sizes and length of an existing array; everything else must be as this format writes it."""
    try:
        length = metadata["shape"][0]
        chunk_rows = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
        shard_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        layout = replace(expected, chunk_rows=chunk_rows, chunks_per_shard=shard_rows // chunk_rows)
        wanted = array_metadata(layout, length)
    except (LookupError, TypeError, ZeroDivisionError):
        raise UserError(f"{where} describes no array of this format; restore the part, or remove it and dump its unit again") from None
    if metadata != wanted:
        keys = ", ".join(key for key in sorted({*metadata, *wanted}) if metadata.get(key) != wanted.get(key))
        raise UserError(f"{where} differs from what this format writes in {keys}; restore the part, or remove it and dump its unit again")
    return layout, length


def shard_file(layout: Layout, shard: int) -> str:
    """File name of a shard inside its array's folder: c.3.0 for [T, H], c.3 for [T]."""
    return ".".join(["c", str(shard), *("0" for _ in layout.row_shape)])
