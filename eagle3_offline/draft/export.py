"""The draft as a folder that SGLang loads: config.json and model.safetensors, and how to read it back.

SGLang ignores unknown and missing weight names silently, so the exact key set is checked here, on both ways.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import ExportConfig
from ..records import Summary, UserError
from ..runs import atomic_folder
from .model import DraftHead
from .settings import DraftSettings
from .trained import load_trained
from .vocabulary import DraftVocabulary

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def export(draft_folder: Path, target_files: Mapping[str, bytes], config: ExportConfig) -> Summary:
    """Export a trained draft to draft_folder/export, whole or not at all, and load it back.

    target_files: the target's small files by name, as the dump carries them.
    """
    trained = load_trained(draft_folder)
    target_config = json.loads(target_files["config.json"])
    special_ids = {key: target_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    about = {
        "channel_scale": "folded into fc" if trained.aux_scale is not None else "none",
        "layer_convention": "boundary",
        "layers": list(trained.head.settings.layers),
        **trained.about,
    }
    folder = draft_folder / "export"
    config_json = export_config(trained.head.settings, config.dtype, special_ids, about)
    with atomic_folder(folder) as temporary:
        write_export(temporary, trained.head, trained.vocabulary, config_json, trained.aux_scale)
        for name in TOKENIZER_FILES:
            if name in target_files:
                (temporary / name).write_bytes(target_files[name])
        read_export(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # an earlier export gives way only now
    return {"folder": str(folder), "to": config.to, "dtype": config.dtype, "bytes": sum(path.stat().st_size for path in folder.iterdir())}


def fold_aux_scale(fc: Tensor, aux_scale: Tensor | None) -> Tensor:
    """fc [H, A] such that fc_folded @ aux = fc @ (aux * aux_scale): an ordinary EAGLE-3 fc."""
    return fc if aux_scale is None else fc * aux_scale


def export_config(settings: DraftSettings, dtype: str, special_ids: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json for SGLang. Layer ids in its dialect: boundary b is the output of layer b - 1."""
    rope = dict(settings.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_key_value_heads,
        "head_dim": settings.head_dim,
        "hidden_act": settings.hidden_act,
        "rms_norm_eps": settings.rms_norm_eps,
        "max_position_embeddings": settings.max_position_embeddings,
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": settings.vocab_size,
        "draft_vocab_size": settings.draft_vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [b - 1 for b in settings.layers], "use_aux_hidden_state": True},
        **special_ids,
        "eagle3_offline": provenance,
    }


def write_export(folder: Path, head: DraftHead, vocabulary: DraftVocabulary, config: dict[str, Any], aux_scale: Tensor | None) -> None:
    """Write the weights (scale folded into fc) and the config into an existing folder."""
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {name: tensor.detach().float() for name, tensor in head.state_dict().items()}
    tensors["fc.weight"] = fold_aux_scale(tensors["fc.weight"], None if aux_scale is None else aux_scale.float())
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    tensors["d2t"] = torch.from_numpy(vocabulary.d2t)
    tensors["t2d"] = torch.from_numpy(vocabulary.t2d(config["vocab_size"]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_export(folder: Path) -> tuple[DraftHead, Tensor]:
    """Load an exported draft in fp32: the head and target_ids [D]. Raises UserError for a missing or unexpected key or shape."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head = DraftHead(_settings(config))
    tensors = load_file(folder / "model.safetensors")
    d2t, t2d = tensors.pop("d2t"), tensors.pop("t2d")
    try:
        head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    except RuntimeError as error:
        raise UserError(f"{folder}/model.safetensors does not hold the draft that its config.json describes: {error}") from None
    target_ids = torch.arange(len(d2t)) + d2t
    if not torch.equal(t2d.nonzero()[:, 0], target_ids):
        raise UserError(f"{folder}/model.safetensors: d2t and t2d name different tokens")
    return head.eval(), target_ids


def _settings(config: dict[str, Any]) -> DraftSettings:
    return DraftSettings(
        **{name: config[name] for name in (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
            "draft_vocab_size", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "hidden_act")},
        layers=tuple(i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
    )  # fmt: skip
