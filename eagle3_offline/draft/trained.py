"""A trained draft on disk, before export: weights.safetensors (fp32) and draft.json, whose presence means done.

Beside them the target's small files, and, where it was trained from a compact dump, the basis of its projection: an export needs no dump.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from ..records import UserError
from ..runs import atomic_folder, atomic_path, read_json, write_json
from .model import DraftHead
from .settings import DraftSettings
from .vocabulary import DraftVocabulary

BASIS, TARGET = "basis.safetensors", "target"


@dataclass(frozen=True)
class TrainedDraft:
    """A draft as the trainer left it: its fc reads channels multiplied by aux_scale, or projected by the basis of a compact dump."""

    head: DraftHead  # fp32
    vocabulary: DraftVocabulary
    aux_scale: Tensor | None  # [A]
    about: dict[str, Any]  # dump: manifest digest; target: fingerprint; summary of the training; basis: digest of basis.safetensors
    basis: bytes | None = None  # the dump's basis.safetensors

    @property
    def target_ids(self) -> Tensor:
        return torch.from_numpy(self.vocabulary.target_ids)

    @cached_property
    def projection(self) -> Tensor | None:
        """P [n_aux * H, r] fp32: what the captured states are multiplied by before fc; None: they are not."""
        if self.basis is None:
            return None
        basis = load(self.basis)
        return basis["components"] / basis["scale"][:, None]

    def project(self, aux: np.ndarray) -> np.ndarray:
        """Raw captured states [T, n_aux * H] in fp32 as the trained fc reads them: [T, A], before aux_scale."""
        return aux if self.projection is None else (torch.from_numpy(aux) @ self.projection).numpy()


def is_trained(folder: Path) -> bool:
    return (folder / "draft.json").is_file()


def save_trained(folder: Path, weights: dict[str, Tensor], draft: TrainedDraft, target_files: Mapping[str, bytes]) -> None:
    """Write a draft whose fp32 `weights` replace those of draft.head. target_files: the target's small files by name."""
    about = draft.about
    if draft.basis is not None:
        about = {**about, "basis": xxhash.xxh3_128_hexdigest(draft.basis)}
        with atomic_path(folder / BASIS) as temporary:
            temporary.write_bytes(draft.basis)
    shutil.rmtree(folder / TARGET, ignore_errors=True)
    with atomic_folder(folder / TARGET) as temporary:
        for name, data in target_files.items():
            (temporary / name).write_bytes(data)
    tensors = {**weights, "target_ids": draft.target_ids}
    if draft.aux_scale is not None:
        tensors["aux_scale"] = draft.aux_scale
    with atomic_path(folder / "weights.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "draft.json", {"settings": draft.head.settings.to_dict(), "coverage": draft.vocabulary.coverage, **about})


def load_trained(folder: Path) -> TrainedDraft:
    if not is_trained(folder):
        raise UserError(f"{folder} holds no trained draft (no draft.json): run `train` first, or let it finish")
    about = read_json(folder / "draft.json")
    tensors = load_file(folder / "weights.safetensors")
    vocabulary = DraftVocabulary(tensors.pop("target_ids").numpy(), about.pop("coverage"))
    aux_scale = tensors.pop("aux_scale", None)
    head = DraftHead(DraftSettings.from_dict(about.pop("settings")))
    head.load_state_dict(tensors, strict=True)
    return TrainedDraft(head.eval(), vocabulary, aux_scale, about, _read_basis(folder, about.get("basis")))


def target_files(folder: Path) -> dict[str, bytes]:
    """The target's small files by name, as the dump carried them."""
    return {path.name: path.read_bytes() for path in (folder / TARGET).iterdir()}


def _read_basis(folder: Path, digest: str | None) -> bytes | None:
    if digest is None:
        return None
    data = (folder / BASIS).read_bytes()
    if (found := xxhash.xxh3_128_hexdigest(data)) != digest:
        raise UserError(f"{folder / BASIS} has digest {found}, expected {digest}, with which the draft was trained: copy it from the dump")
    return data
