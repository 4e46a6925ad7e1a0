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
from safetensors import TensorSpec, serialize

from ..records import STORAGE_DTYPE, UserError
from .places import LocalPlace, Place

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


def file_record(where: Place) -> dict[str, Any]:
    """Size and digest of a file."""
    state, file, offset = xxhash.xxh3_128(), where.open(), 0
    while offset < file.size:
        block = file.read_range(offset, min(_READ_BYTES, file.size - offset))
        if not block:
            raise OSError(5, "The file became shorter while it was read", str(where))
        state.update(block)
        offset += len(block)
    return {"bytes": offset, "xxh3_128": state.hexdigest()}


def damage(where: Place, record: Mapping[str, Any]) -> str | None:
    """How a file differs from its record; None where it does not. Raises OSError where it cannot be read, which says nothing of it."""
    if (text := size_problem(where, where.size(), record)) is not None:
        return text
    if (found := file_record(where)["xxh3_128"]) != record["xxh3_128"]:
        return f"{where} has digest {found}, expected {record['xxh3_128']}; its content is damaged: {MEND}"
    return None


def problem(where: Place, record: Mapping[str, Any]) -> str | None:
    """What is wrong with a file: damaged, or not to be read."""
    try:
        return damage(where, record)
    except OSError as error:
        return f"{where} cannot be read ({error}): {MEND}"


def size_problem(where: Place, size: int | None, record: Mapping[str, Any]) -> str | None:
    """What is wrong with a file's size, None for a missing file."""
    if size is None:
        return f"{where} is missing; expected {record['bytes']} bytes: {MEND}"
    if size != record["bytes"]:
        return f"{where} has {size} bytes, expected {record['bytes']}: {MEND}"
    return None


def check(where: Place, record: Mapping[str, Any]) -> None:
    """Raise where `problem` finds something."""
    if text := problem(where, record):
        raise UserError(text)


def read_checked(where: Place, record: Mapping[str, Any]) -> bytes:
    """The content of a small file, read once and compared with its record."""
    try:
        data = where.read()
    except FileNotFoundError:
        raise UserError(f"{where} is missing; expected {record['bytes']} bytes: {MEND}") from None
    if text := size_problem(where, len(data), record):
        raise UserError(text)
    if (found := record_of(data)["xxh3_128"]) != record["xxh3_128"]:
        raise UserError(f"{where} has digest {found}, expected {record['xxh3_128']}; its content is damaged: {MEND}")
    return data


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file through to the disk; return its record."""
    with open(path, "xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return record_of(data)


def tensor_bytes(tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str] | None = None) -> bytes:
    """Arrays as a safetensors file; `dtypes` names the logical dtype of those that are not plain numpy."""
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    logical = {name: (dtypes or {}).get(name, array.dtype.name) for name, array in arrays.items()}
    for name, array in arrays.items():
        if STORAGE_DTYPE.get(logical[name], array.dtype) != array.dtype:
            raise UserError(f"tensor {name} is {array.dtype}, but {logical[name]} is stored as {STORAGE_DTYPE[logical[name]]}; pass it so")
    specs = {
        name: TensorSpec(dtype=logical[name], shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    return serialize(specs, {"format": "pt"})


def tensors_of(data: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> view of every tensor in the bytes [n] uint8 of a safetensors file; bfloat16 comes as uint16. Check its digest first."""
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:begin].tobytes())
    header.pop("__metadata__", None)
    return {name: _view(data[begin:], entry) for name, entry in header.items()}


def read_tensors(where: Place) -> dict[str, np.ndarray]:
    """Name -> read-only array of every tensor of a safetensors file: a memory map of a local one. Check its digest first."""
    return tensors_of(np.memmap(where.path, np.uint8, "r") if isinstance(where, LocalPlace) else np.frombuffer(where.read(), np.uint8))


def tensor_dtypes(where: Place) -> dict[str, str]:
    """Name -> logical dtype of every tensor of a safetensors file."""
    file = where.open()
    size = int.from_bytes(file.read_range(0, 8), "little")
    header = json.loads(bytes(file.read_range(8, size)))
    header.pop("__metadata__", None)
    return {name: _TENSOR_DTYPES[entry["dtype"]][0] for name, entry in header.items()}


def _view(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    return data[start:end].view(_TENSOR_DTYPES[entry["dtype"]][1]).reshape(entry["shape"])
