"""What a sealed dump holds: bytes per array beside what order-0 coding could reach, tokens, lengths. Legend: T tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .format import EXACT_CODECS, state_layouts
from .part import Part, read_part_json
from .places import Place, place
from .reader import Dump

_SAMPLE_BYTES = 32 << 20  # of an array, for its entropy
_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def info(where: Place | Path | str) -> dict[str, Any]:
    """Of a dump: sizes and ratios per array, tokens, supervised share, row lengths."""
    dump = Dump.open(place(where))
    counts, sizes = dump.manifest["counts"], _file_sizes(dump)
    return {
        "dump": str(dump.where),
        "mode": "compact" if dump.spec.compact else "full",
        "codec": dump.spec.codec,
        "last_codec": dump.spec.last_codec,
        "rows": len(dump),
        "rejected": counts["rejected"],
        "tokens": counts["tokens"],
        "supervised_share": counts["supervised"] / max(1, counts["tokens"]),
        "stored_bytes": counts["stored_bytes"],
        "bytes_per_token": counts["stored_bytes"] / max(1, counts["tokens"]),
        "share_of_raw": counts["stored_bytes"] / max(1, counts["raw_bytes"]),
        "files": len(sizes) + len(dump.manifest["parts"]),  # and each part's part.json
        "arrays": _arrays(dump, sizes),
        "lengths": _histogram(dump.lengths),
    }


def _file_sizes(dump: Dump) -> list[tuple[str, int]]:
    """(array, bytes) of every file that a part lists; the group's own zarr.json under that name."""
    contents = (read_part_json(dump.where / "parts" / entry["name"], entry["part_json"]) for entry in dump.manifest["parts"])
    return [(name.partition("/")[0], record["bytes"]) for content in contents for name, record in content["files"].items()]


def _arrays(dump: Dump, sizes: list[tuple[str, int]]) -> dict[str, dict[str, float]]:
    """By array: stored bytes, and for exact states the ratio to raw beside the bound of order-0 coding."""
    stored: Counter[str] = Counter()
    for array, size in sizes:
        stored[array] += size
    spec, counts = dump.spec, dump.manifest["counts"]
    teachers = sum(entry["last"] for entry in dump.manifest["parts"])
    report: dict[str, dict[str, float]] = {name: {"bytes": size} for name, size in sorted(stored.items()) if name != "zarr.json"}
    for name, codec, tokens, width in [
        *((name, spec.codec, counts["tokens"], spec.aux_width) for name in spec.aux_arrays),
        *([("last", spec.last_codec, teachers, spec.hidden_size)] if spec.last_codec else []),
    ]:
        raw = tokens * width * spec.storage_dtype.itemsize
        kept = (name, *(f"{name}_{suffix}" for suffix in state_layouts(spec)[name].companions))
        total = sum(stored[array] for array in kept)
        report[name] |= {"ratio": raw / max(1, total)}
        if codec in EXACT_CODECS:
            report[name] |= {"entropy_ratio": entropy_ratio(_sample(dump, name))}
    return report


def _sample(dump: Dump, name: str) -> np.ndarray:
    """Some states of an array, from the first parts on."""
    pieces, size = [], 0
    for entry in dump.manifest["parts"]:
        states = Part(dump.where / "parts" / entry["name"], dump.spec, entry["part_json"]).states[name]
        tokens = min(states.length, (_SAMPLE_BYTES - size) // (states.width * dump.spec.storage_dtype.itemsize))
        pieces.append(states.read(0, tokens))
        size += pieces[-1].nbytes
        if size >= _SAMPLE_BYTES * 0.9:
            break
    return np.concatenate(pieces)


def entropy_ratio(states: np.ndarray) -> float:
    """Raw bits over the order-0 entropy of each byte plane: what coding single bytes well, one plane apart from the other, reaches."""
    planes = np.ascontiguousarray(states).view(np.uint8).reshape(-1, states.dtype.itemsize)
    if not len(planes):
        return 1.0
    bits = 0.0
    for plane in planes.T:
        share = np.bincount(plane, minlength=256) / len(plane)
        bits -= float((share[share > 0] * np.log2(share[share > 0])).sum())
    return 8 * states.dtype.itemsize / max(bits, 1e-9)


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """Rows by length: "<= 64": 12, ..."""
    edges = [0, *_LENGTHS, 1 << 31]
    counts, _ = np.histogram(lengths, [edge + 1 for edge in edges])
    names = [f"<= {edge}" for edge in _LENGTHS] + [f"> {_LENGTHS[-1]}"]
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}
