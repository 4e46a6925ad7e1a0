"""Files of a dump: size and digest records, and safetensors tables that bfloat16 passes through as uint16.

The safetensors package has no numpy bfloat16, and orders several metadata keys at random; hence one key and an own reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import TensorSpec, serialize_file

from ..records import STORAGE_DTYPE, UserError
from ..runs import fsync_path

MEND = "restore it from a copy, or remove what holds it and make it again"
_READ_BYTES = 4 << 20

# safetensors dtype -> numpy storage dtype, and the name under which it is written
_TENSOR_DTYPES = {
    "BF16": ("bfloat16", np.dtype("uint16")),
    "F16": ("float16", np.dtype("float16")),
    "F32": ("float32", np.dtype("float32")),
    "F64": ("float64", np.dtype("float64")),
    "I64": ("int64", np.dtype("int64")),
    "I32": ("int32", np.dtype("int32")),
    "U8": ("uint8", np.dtype("uint8")),
}


def record_of(data: bytes) -> dict[str, Any]:
    """Size and digest of a file's content."""
    return {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def file_record(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    state, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as handle:
        while block := handle.read(_READ_BYTES):
            state.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_128": state.hexdigest()}


def problem(path: Path, record: Mapping[str, Any], sizes_only: bool = False) -> str | None:
    """What is wrong with a file against its record; None where nothing is."""
    try:
        found = {"bytes": path.stat().st_size} if sizes_only else file_record(path)
    except FileNotFoundError:
        return f"{path} is missing; expected {record['bytes']} bytes: {MEND}"
    except OSError as error:
        return f"{path} cannot be read ({error}): {MEND}"
    if found["bytes"] != record["bytes"]:
        return f"{path} has {found['bytes']} bytes, expected {record['bytes']}: {MEND}"
    if not sizes_only and found["xxh3_128"] != record["xxh3_128"]:
        return f"{path} has digest {found['xxh3_128']}, expected {record['xxh3_128']}; its content is damaged: {MEND}"
    return None


def check(path: Path, record: Mapping[str, Any], sizes_only: bool = False) -> None:
    """Raise where `problem` finds something."""
    if text := problem(path, record, sizes_only):
        raise UserError(text)


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file through to the disk; return its record."""
    with open(path, "xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return record_of(data)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str] | None = None) -> None:
    """Write arrays as safetensors through to the disk; `dtypes` names the logical dtype of those that are not plain numpy."""
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    logical = {name: (dtypes or {}).get(name, array.dtype.name) for name, array in arrays.items()}
    for name, array in arrays.items():
        if STORAGE_DTYPE.get(logical[name], array.dtype) != array.dtype:
            raise UserError(f"tensor {name} is {array.dtype}, but {logical[name]} is stored as {STORAGE_DTYPE[logical[name]]}; pass it so")
    specs = {
        name: TensorSpec(dtype=logical[name], shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    serialize_file(specs, path, {"format": "pt"})
    fsync_path(path)


def tensor_header(path: Path) -> tuple[dict[str, Any], int]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file, and where its data begins."""
    with open(path, "rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def tensor_dtypes(path: Path) -> dict[str, str]:
    """Name -> logical dtype of every tensor."""
    return {name: _TENSOR_DTYPES[entry["dtype"]][0] for name, entry in tensor_header(path)[0].items()}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Name -> read-only memory map of every tensor; bfloat16 comes as uint16. Check the file's digest first."""
    header, begin = tensor_header(path)
    data = np.memmap(path, np.uint8, "r")
    return {name: _view(data[begin:], entry) for name, entry in header.items()}


def _view(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    return data[start:end].view(_TENSOR_DTYPES[entry["dtype"]][1]).reshape(entry["shape"])
