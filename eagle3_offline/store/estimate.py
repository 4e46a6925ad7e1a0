"""What a dump will take, before anything runs. Legend: H hidden size, r rank and k logits of a compact dump."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..records import STORAGE_DTYPE, UserError
from .format import SHARD_BYTES, DumpSpec, plain_layouts, state_layouts

# Stored bytes as a share of the raw ones of the engine's dtype. bfloat16 and float16 as measured on real targets (benchmarks/RESULTS.md),
# a little above so that a preflight errs on the safe side; fp32 noise hardly compresses.
_SHARE = {
    "bfloat16": {"lossless": 0.75, "lossless-fast": 0.85, "none": 1.0, "int8": 0.50, "fp8": 0.50, "bitround": 0.58},
    "float16": {"lossless": 0.92, "lossless-fast": 0.97, "none": 1.0, "int8": 0.50, "fp8": 0.50, "bitround": 0.62},
    "float32": {"lossless": 0.90, "lossless-fast": 0.95, "none": 1.0, "int8": 0.25, "fp8": 0.25, "bitround": 0.40},
}
_TOKEN_BYTES = 4.0  # ids, mask and tables, compressed


@dataclass(frozen=True)
class Estimate:
    rows: int
    tokens: int
    teachers: int
    bytes: int
    bytes_per_token: float
    raw_bytes: int  # as public trainers write it: captured layers and last states of every token
    share_of_raw: float
    files: int
    hours: float | None  # at the rate that was given

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    spec: DumpSpec, rows: int, tokens: int, teachers: int, unit_rows: int = 2000, tokens_per_second: float | None = None
) -> Estimate:
    """Bytes and files of a dump; hours for one engine at `tokens_per_second`.

    teachers: tokens whose teacher is kept, the supervised ones and one on each side of a turn.
    """
    item = STORAGE_DTYPE[spec.dtype].itemsize
    aux = spec.aux_channels * item * _SHARE[spec.dtype][spec.codec]
    if spec.compact is None:
        teacher = spec.hidden_size * item * _SHARE[spec.dtype][spec.last_codec]
    else:
        teacher = spec.compact.top_k * (2 + (2 if spec.vocab_size <= 1 << 16 else 3)) + 4
    total = int(tokens * (aux + _TOKEN_BYTES) + teachers * teacher)
    raw = tokens * (len(spec.layers) + 1) * spec.hidden_size * item
    return Estimate(
        rows=rows,
        tokens=tokens,
        teachers=teachers,
        bytes=total,
        bytes_per_token=total / tokens if tokens else 0.0,
        raw_bytes=raw,
        share_of_raw=total / raw if raw else 0.0,
        files=_files(spec, rows, tokens, teachers, unit_rows),
        hours=tokens / tokens_per_second / 3600 if tokens_per_second else None,
    )


def refuse_full_disk(folder: Path | str, needed: int, what: str, force: bool) -> None:
    """Raise UserError where the disk of a folder (which need not exist yet) has less than `needed` bytes free, unless forced."""
    where = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
    free = shutil.disk_usage(where).free
    if needed > free and not force:
        raise UserError(
            f"{what} is estimated at {needed / 1e9:,.2f} GB, {where} has {free / 1e9:,.2f} GB free: make room, "
            f"choose another codec or mode (see `store estimate`), or go on nevertheless with --set dump.force=true"
        )


def _files(spec: DumpSpec, rows: int, tokens: int, teachers: int, unit_rows: int) -> int:
    """Every array has its metadata and at least one shard in each part; states fill more."""
    parts = max(1, -(-rows // unit_rows))
    states = state_layouts(spec)
    arrays = len(plain_layouts(spec)) + sum(1 + len(layout.companions) for layout in states.values())
    shards = 0
    for name, layout in states.items():
        raw = (teachers if name == "last" else tokens) / parts * layout.main.row_bytes
        shards += max(0, -(-int(raw) // SHARD_BYTES) - 1)
    return parts * (2 * arrays + 2 + shards)
