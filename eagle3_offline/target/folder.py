"""A target as a folder of files: finding it, its fingerprint, and the tensors that training needs of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import TargetConfig
from ..records import STORAGE_DTYPE, UserError

CARRIED = (  # small files that travel with the dump
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
HEAD_TENSORS = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
LAYER_TENSORS = (  # of a plain decoder layer, and of a draft's
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
)  # fmt: skip
PLAIN_LAYERS = ("llama", "mistral")  # model types whose decoder layers are what a draft's is
NORMS_FROM_ZERO = (  # model types whose norms multiply by 1 + weight
    "gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
    "vaultgemma",
)  # fmt: skip


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """A local folder as it is; a hub name from the hub or its local cache. Raises UserError where neither is to be had."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"target.model is {model!r}: neither a local folder with a config.json nor a model that the hub gave ({error})"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def text_config(folder: Path) -> dict[str, Any]:
    """The language model's part of config.json."""
    config = read_config(folder)
    return config.get("text_config", config)


def target_dtype(config: TargetConfig, folder: Path) -> str:
    """The dtype in which the target runs; `auto` is that of its config."""
    if config.dtype != "auto":
        return config.dtype
    found = text_config(folder).get("dtype") or text_config(folder).get("torch_dtype") or "float32"
    if found not in STORAGE_DTYPE:
        raise UserError(f"{folder}/config.json says dtype {found!r}; give one of {', '.join(STORAGE_DTYPE)} with --set target.dtype=...")
    return found


def quick_fingerprint(folder: Path, chat_template_digest: str) -> dict[str, Any]:
    """What tells one target from another without reading its weights: hashes of small files, names and sizes of large ones."""
    return {
        "config": _sha256(folder / "config.json"),
        "generation_config": _sha256(folder / "generation_config.json"),  # it names the ids that end an answer
        "tokenizer": _sha256(folder / "tokenizer.json"),
        "chat_template": chat_template_digest,
        "weight_files": {path.name: path.stat().st_size for path in _weight_files(folder)},
    }


def weights_hash(folder: Path) -> str:
    """sha256 over all weight files, in the order of their names. Reads every byte."""
    total = hashlib.sha256()
    for path in _weight_files(folder):
        with open(path, "rb") as handle:
            while block := handle.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def carried_files(folder: Path) -> dict[str, bytes]:
    """Config, tokenizer and template files, for the dump and for exports."""
    return {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).is_file()}


def head_tensors(folder: Path, dtype: str) -> dict[str, Tensor]:
    """embed_tokens.weight [V, H], norm.weight [H] and lm_head.weight [V, H] in the engine's dtype; a tied head is the embedding.

    norm.weight is what the normed state is multiplied by: of a Gemma one more than its weights. lm_head.bias [V] where there is one.
    """
    found = _read_tensors(folder, (*HEAD_TENSORS, "lm_head.bias"))
    found.setdefault("lm_head.weight", found.get("embed_tokens.weight"))
    if missing := [name for name in HEAD_TENSORS if found.get(name) is None]:
        raise UserError(f"{folder}: no {', '.join(missing)} among its weights, which training needs")
    found["norm.weight"] = _effective(found["norm.weight"], folder)
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in found.items()}


def carried_tensors(folder: Path, dtype: str) -> dict[str, Tensor]:
    """What a dump carries of the target: `head_tensors`, and the last decoder layer as last_layer.* where it is a plain one.

    A draft may start from it. That of another family, or one with biases, computes something else than a draft's layer and is left out.
    """
    config, found = text_config(folder), head_tensors(folder, dtype)
    if config.get("model_type") not in PLAIN_LAYERS or config.get("hidden_act", "silu") != "silu":
        return found
    prefix = f"layers.{config['num_hidden_layers'] - 1}."
    biases = (name.replace(".weight", ".bias") for name in LAYER_TENSORS)
    layer = _read_tensors(folder, tuple(prefix + name for name in (*LAYER_TENSORS, *biases)))
    if {*layer} != {prefix + name for name in LAYER_TENSORS}:
        return found
    return found | {f"last_layer.{name}": layer[prefix + name].to(getattr(torch, dtype)) for name in LAYER_TENSORS}


def final_norm(folder: Path) -> Tensor:
    """[H] fp32: norm.weight alone, as `head_tensors` has it."""
    found = _read_tensors(folder, ("norm.weight",))
    if not found:
        raise UserError(f"{folder}: no norm.weight among its weights, which training needs")
    return _effective(found["norm.weight"], folder)


def _effective(norm: Tensor, folder: Path) -> Tensor:
    return norm.float() + (1 if text_config(folder).get("model_type") in NORMS_FROM_ZERO else 0)


def _read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of these tensors that the language model has."""
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                if (plain := _without_prefixes(name)) in names:
                    found[plain] = handle.get_tensor(name)
    return found


def _without_prefixes(name: str) -> str:
    """model.norm.weight, model.language_model.norm.weight and language_model.model.norm.weight are all norm.weight."""
    for prefix in ("model.", "language_model.", "model."):
        name = name.removeprefix(prefix)
    return name


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors weights")
    return files


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} does not exist: the target's folder is not complete")
    return hashlib.sha256(path.read_bytes()).hexdigest()
