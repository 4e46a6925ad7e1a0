"""The slow twin of the reader: plain zarr and safetensors, none of our decoding. For tests, and as an example of another reader.

It reads dumps whose states are exact; what lossy codecs and compact dumps add is in FORMAT.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import zarr
from safetensors.numpy import load_file

from ..records import Sample


def read_sample_with_zarr(dump_path: Path, i: int) -> Sample:
    """Row `i` with all its layers."""
    manifest = json.loads((Path(dump_path) / "dump.json").read_text())
    rows = load_file(Path(dump_path) / "rows.safetensors")
    part, row = manifest["parts"][rows["part"][i]], rows["row"][i]
    group = zarr.open_group(Path(dump_path) / "parts" / part["name"], mode="r")

    start, stop = group["offsets"][row : row + 2]
    turn_start, turn_stop = group["turn_offsets"][row : row + 2]
    last_start, last_stop = group["last_offsets"][row : row + 2]
    mask = np.pad(group["loss_mask"][start:stop], 1)  # [T+2]
    return Sample(
        id=rows["id_bytes"][rows["id_offsets"][i] : rows["id_offsets"][i + 1]].tobytes().decode(),
        input_ids=group["input_ids"][start:stop],
        turns=tuple(map(tuple, group["turns"][turn_start:turn_stop].tolist())),
        aux=np.concatenate([group[f"h{layer:02d}"][start:stop] for layer in manifest["spec"]["layers"]], axis=1),
        last=group["last"][last_start:last_stop],
        last_positions=np.flatnonzero(mask[:-2] | mask[1:-1] | mask[2:]),
    )
