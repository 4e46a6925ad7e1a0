"""The target's tensors and small files that a dump carries, so that training opens no target. V vocabulary size, H hidden size."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..records import UserError
from ..runs import fsync_path, read_json
from .files import file_record, write_bytes, write_tensors
from .format import TARGET, json_bytes

TENSORS, INDEX = "target.safetensors", "index.json"
REQUIRED = ("embed_tokens.weight", "norm.weight", "lm_head.weight")  # [V, H], [H], [V, H]


def write_target(dump: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Write `dump/target/` once and return its index; a later call must bring the same content.

    `tensors` in storage dtype, `dtypes` their logical dtypes by name; `files` are config.json, tokenizer files, chat template, ... by name.
    """
    _check(tensors, dtypes, files)
    folder = Path(dump) / TARGET
    temporary = folder.with_name(f".{TARGET}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a dead process with our host and pid
    temporary.mkdir(parents=True)
    try:
        index = _write(temporary, tensors, dtypes, files)
        _publish(temporary, folder, index)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def read_index(dump: Path) -> dict[str, Any]:
    """File name -> record of every file of `dump/target/` but the index itself."""
    path = Path(dump) / TARGET / INDEX
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the target's files beside the parts: write them before sealing the dump")
    return read_json(path)


def _check(tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], files: Mapping[str, bytes]) -> None:
    if missing := [name for name in REQUIRED if name not in tensors]:
        raise UserError(f"the target's tensors lack {', '.join(missing)}; found {', '.join(sorted(tensors))}")
    if set(dtypes) != set(tensors):
        raise UserError(f"dtypes name {sorted(dtypes)}, the tensors are {sorted(tensors)}; expected one dtype for each tensor")
    vocab, hidden = tensors["embed_tokens.weight"].shape
    for name, shape in zip(REQUIRED, ((vocab, hidden), (hidden,), (vocab, hidden)), strict=True):
        if tensors[name].shape != shape:
            raise UserError(f"{name} is {list(tensors[name].shape)}; expected {list(shape)}, to go with embed_tokens.weight")
    for name in files:
        if name in (TENSORS, INDEX) or Path(name).name != name or name.startswith("."):
            raise UserError(f"target file {name!r}: expected a plain file name other than {TENSORS} and {INDEX}")


def _write(folder: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], files: Mapping[str, bytes]) -> dict[str, Any]:
    write_tensors(folder / TENSORS, tensors, dtypes)
    index = {TENSORS: file_record(folder / TENSORS)}
    for name in sorted(files):
        index[name] = write_bytes(folder / name, files[name])
    write_bytes(folder / INDEX, json_bytes(index))
    fsync_path(folder)
    return index


def _publish(temporary: Path, folder: Path, index: Mapping[str, Any]) -> None:
    try:
        os.rename(temporary, folder)
        fsync_path(folder.parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        found = json.loads((folder / INDEX).read_bytes())
        if found != index:
            names = ", ".join(name for name in sorted({*found, *index}) if found.get(name) != index.get(name))
            raise UserError(
                f"{folder} was written for another target: {names} differ. Use another dump folder, or remove this one"
            ) from None
