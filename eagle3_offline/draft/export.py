"""The draft as a folder that an inference engine loads: config.json, model.safetensors, a model card; and how to read it back.

SGLang ignores unknown and missing weight names silently, so the exact key set is checked here, on both ways.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import ExportConfig
from ..records import Summary, UserError
from ..runs import atomic_folder
from .card import model_card
from .layout import export_config, refuse_unservable, settings_of, spelled, unspelled
from .model import DraftHead
from .trained import TrainedDraft, load_trained, target_files

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def export(draft_folder: Path, config: ExportConfig) -> Summary:
    """Export a trained draft to draft_folder/export, whole or not at all, and load it back. Needs no dump."""
    trained, carried = load_trained(draft_folder), target_files(draft_folder)
    target_config = json.loads(carried["config.json"])
    refuse_unservable(trained.head.settings.layers, config.to, target_config)
    special_ids = {key: target_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    about = {
        "channel_scale": "folded into fc" if trained.aux_scale is not None else "none",
        "projection": "none" if trained.projection is None else f"rank {trained.projection.shape[1]}, folded into fc",
        "layer_convention": "boundary",
        "layers": list(trained.head.settings.layers),
        **trained.about,
    }
    folder = draft_folder / "export"
    config_json = export_config(trained.head.settings, config.to, config.dtype, special_ids, about)
    with atomic_folder(folder) as temporary:
        write_export(temporary, trained, config_json, config.to)
        (temporary / "README.md").write_text(model_card(draft_folder, trained, config.to), encoding="utf-8")
        for name in TOKENIZER_FILES:
            if name in carried:
                (temporary / name).write_bytes(carried[name])
        read_export(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # an earlier export gives way only now
    return {"folder": str(folder), "to": config.to, "dtype": config.dtype, "bytes": sum(path.stat().st_size for path in folder.iterdir())}


def folded_fc(trained: TrainedDraft) -> Tensor:
    """fc [H, n_aux * H] fp32 over raw captured states, an ordinary EAGLE-3 fc: folded @ aux = fc @ (aux @ P * aux_scale)."""
    fc = trained.head.fc.weight.detach().float()
    if trained.aux_scale is not None:
        fc = fc * trained.aux_scale
    return fc if trained.projection is None else fc @ trained.projection.T


def write_export(folder: Path, trained: TrainedDraft, config: dict[str, Any], to: str) -> None:
    """Write the weights (scale and projection folded into fc) and the config into an existing folder."""
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {name: tensor.detach().float() for name, tensor in trained.head.state_dict().items()}
    tensors["fc.weight"] = folded_fc(trained)
    tensors = spelled({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, to)
    tensors["d2t"] = torch.from_numpy(trained.vocabulary.d2t)
    tensors["t2d"] = torch.from_numpy(trained.vocabulary.t2d(config["vocab_size"]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of an export."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no exported draft (no config.json): run `export` first")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def read_export(folder: Path) -> tuple[DraftHead, Tensor]:
    """Load an exported draft in fp32: the head and target_ids [D]. Raises UserError for a missing or unexpected key or shape."""
    head = DraftHead(settings_of(read_config(folder)))
    tensors = load_file(folder / "model.safetensors")
    d2t, t2d = tensors.pop("d2t"), tensors.pop("t2d")
    try:
        head.load_state_dict({name: tensor.float() for name, tensor in unspelled(tensors).items()}, strict=True)
    except RuntimeError as error:
        raise UserError(f"{folder}/model.safetensors does not hold the draft that its config.json describes: {error}") from None
    target_ids = torch.arange(len(d2t)) + d2t
    if not torch.equal(t2d.nonzero()[:, 0], target_ids):
        raise UserError(f"{folder}/model.safetensors: d2t and t2d name different tokens")
    return head.eval(), target_ids
