"""A trained draft on disk, before export: weights.safetensors (fp32) and draft.json, whose presence means done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..records import UserError
from ..runs import atomic_path, read_json, write_json
from .model import DraftHead
from .settings import DraftSettings
from .vocabulary import DraftVocabulary


@dataclass(frozen=True)
class TrainedDraft:
    """A draft as the trainer left it: its fc reads channels multiplied by aux_scale."""

    head: DraftHead  # fp32
    vocabulary: DraftVocabulary
    aux_scale: Tensor | None  # [n_aux * H]
    about: dict[str, Any]  # dump: manifest digest; target: fingerprint; summary of the training

    @property
    def target_ids(self) -> Tensor:
        return torch.from_numpy(self.vocabulary.target_ids)


def is_trained(folder: Path) -> bool:
    return (folder / "draft.json").is_file()


def save_trained(folder: Path, weights: dict[str, Tensor], draft: TrainedDraft) -> None:
    """Write a draft whose fp32 `weights` replace those of draft.head."""
    tensors = {**weights, "target_ids": draft.target_ids}
    if draft.aux_scale is not None:
        tensors["aux_scale"] = draft.aux_scale
    with atomic_path(folder / "weights.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "draft.json", {"settings": draft.head.settings.to_dict(), "coverage": draft.vocabulary.coverage, **draft.about})


def load_trained(folder: Path) -> TrainedDraft:
    if not is_trained(folder):
        raise UserError(f"{folder} holds no trained draft (no draft.json): run `train` first, or let it finish")
    about = read_json(folder / "draft.json")
    tensors = load_file(folder / "weights.safetensors")
    vocabulary = DraftVocabulary(tensors.pop("target_ids").numpy(), about.pop("coverage"))
    aux_scale = tensors.pop("aux_scale", None)
    head = DraftHead(DraftSettings.from_dict(about.pop("settings")))
    head.load_state_dict(tensors, strict=True)
    return TrainedDraft(head.eval(), vocabulary, aux_scale, about)
