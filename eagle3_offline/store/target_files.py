"""The target's tensors and small files that a dump carries, so that training opens no target. V vocabulary size, H hidden size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..records import UserError
from ..runs import atomic_folder
from .files import check, read_tensors, record_of, tensor_bytes, write_bytes
from .format import TARGET, json_bytes
from .places import ObjectPlace, Place, place

TENSORS, BASIS, INDEX = "target.safetensors", "basis.safetensors", "index.json"
BIAS = "lm_head.bias"  # [V], where the target has one
LAST_LAYER = "last_layer."  # the target's last decoder layer, where it is a plain one: what begins so
REQUIRED = ("embed_tokens.weight", "norm.weight", "lm_head.weight")  # [V, H], [H], [V, H]


def write_target(
    dump: Place | Path | str,
    tensors: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str],
    files: Mapping[str, bytes],
    basis: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Write `dump/target/` once and return its index; a later call must bring the same content.

    `tensors` in storage dtype, `dtypes` their logical dtypes by name; `files` are config.json, tokenizer files, chat template, ...
    by name; `basis` only for a compact dump.
    """
    _check(tensors, dtypes, files)
    folder = place(dump) / TARGET
    content = {TENSORS: tensor_bytes(tensors, dtypes), **dict(sorted(files.items()))}
    if basis is not None:
        content[BASIS] = tensor_bytes(basis)
    index = {name: record_of(data) for name, data in content.items()}
    if _found(folder) is None:
        _publish(folder, {**content, INDEX: json_bytes(index)})
    if (found := read_index(dump)) != index:  # it was there, or another process was first
        names = ", ".join(name for name in sorted({*found, *index}) if found.get(name) != index.get(name))
        raise UserError(f"{folder} was written for another target: {names} differ. Use another dump folder, or remove this one")
    return index


def has_target(dump: Place | Path | str) -> bool:
    """Whether `dump/target/` is there, whole."""
    return (place(dump) / TARGET / INDEX).size() is not None


def read_index(dump: Place | Path | str) -> dict[str, Any]:
    """File name -> record of every file of `dump/target/` but the index itself."""
    where = place(dump) / TARGET / INDEX
    if (index := _found(place(dump) / TARGET)) is None:
        raise UserError(f"{where} is missing; expected the target's files beside the parts: write them before sealing the dump")
    return index


def read_basis(dump: Place | Path | str) -> dict[str, np.ndarray]:
    """A compact dump's basis before it is sealed, verified."""
    return _checked_tensors(dump, BASIS)


def read_target(dump: Place | Path | str) -> dict[str, np.ndarray]:
    """The target's tensors before the dump is sealed, in storage dtype, verified."""
    return _checked_tensors(dump, TENSORS)


def _checked_tensors(dump: Place | Path | str, name: str) -> dict[str, np.ndarray]:
    where = place(dump) / TARGET / name
    if (record := read_index(dump).get(name)) is None:
        raise UserError(f"{where} does not exist: this is no compact dump's folder")
    check(where, record)
    return read_tensors(where)


def carried(dump: Place | Path | str) -> dict[str, bytes]:
    """The target's small files by name: config, tokenizer, chat template."""
    return {name: (place(dump) / TARGET / name).read() for name in read_index(dump) if name not in (TENSORS, BASIS)}


def _found(folder: Place) -> dict[str, Any] | None:
    """The index that is there."""
    try:
        return json.loads((folder / INDEX).read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / INDEX} is not valid JSON ({error}); it is damaged: restore it, or make it again") from None


def _publish(folder: Place, content: Mapping[str, bytes]) -> None:
    """All files at once: by one rename, or in object storage the index last."""
    if isinstance(folder, ObjectPlace):
        for name, data in content.items():
            (folder / name).write(data)
        return
    with atomic_folder(folder.path) as temporary:
        for name, data in content.items():
            write_bytes(temporary / name, data)


def _check(tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], files: Mapping[str, bytes]) -> None:
    if missing := [name for name in REQUIRED if name not in tensors]:
        raise UserError(f"the target's tensors lack {', '.join(missing)}; found {', '.join(sorted(tensors))}")
    if set(dtypes) != set(tensors):
        raise UserError(f"dtypes name {sorted(dtypes)}, the tensors are {sorted(tensors)}; expected one dtype for each tensor")
    vocab, hidden = tensors["embed_tokens.weight"].shape
    for name, shape in zip((*REQUIRED, BIAS), ((vocab, hidden), (hidden,), (vocab, hidden), (vocab,)), strict=True):
        if name in tensors and tensors[name].shape != shape:
            raise UserError(f"{name} is {list(tensors[name].shape)}; expected {list(shape)}, to go with embed_tokens.weight")
    for name in files:
        if name in (TENSORS, BASIS, INDEX) or Path(name).name != name or name.startswith("."):
            raise UserError(f"target file {name!r}: expected a plain file name other than {TENSORS}, {BASIS} and {INDEX}")
