"""How an exported draft is spelled: weight names and config.json for each engine, and back.

to       decoder layer's names    captured layers in config.json
sglang   midlayer.*               eagle_config: outputs of layers, b - 1 for boundary b
vllm     layers.0.*               top level: boundaries
hf       midlayer.*               both, for a hub repository that either engine may load
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..records import UserError
from .settings import DraftSettings

KEPT = (  # DraftSettings that config.json holds under their own names
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "hidden_act",
    "fc_norm",
    "norm_output",
)
# Model types of which SGLang 0.5.21 captures what enters a layer, so not boundary L; and with its residual, so not boundary 0.
NO_LAST = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
NO_FIRST = ("llama", "mistral")
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def export_config(settings: DraftSettings, to: str, dtype: str, special_ids: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json of an export."""
    rope = settings.rope_parameters
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{name: getattr(settings, name) for name in KEPT},
        **({"target_hidden_size": settings.target_hidden_size} if settings.owns_embedding else {}),
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "norm_before_residual": False,  # the residual is the state before hidden_norm
        "torch_dtype": dtype,
        **_layer_ids(settings.layers, to),
        **special_ids,
        "eagle3_offline": provenance,
    }


def _layer_ids(layers: tuple[int, ...], to: str) -> dict[str, Any]:
    nested = {"eagle_config": {LAYER_IDS: [b - 1 for b in layers], "use_aux_hidden_state": True}}
    boundaries = {LAYER_IDS: list(layers)}
    return {"sglang": nested, "vllm": boundaries, "hf": {**nested, **boundaries}}[to]


def refuse_unservable(layers: tuple[int, ...], to: str, target_config: dict[str, Any]) -> None:
    """Refuse boundaries that the engine is known not to capture, before a draft is trained on them."""
    config = target_config.get("text_config", target_config)
    family, last = config.get("model_type"), config.get("num_hidden_layers")
    unknown = [b for b in layers if (b == 0 and family in NO_FIRST) or (b == last and family in NO_LAST)]
    if to == "sglang" and unknown:
        raise UserError(
            f"export.to is sglang, which does not capture the boundaries {unknown} of a {family} of {last} layers, and the draft reads "
            f"them: choose other train.layers, or set export.to to vllm or hf where your engine serves them"
        )


def layers_of(config: dict[str, Any]) -> tuple[int, ...]:
    """The captured boundaries that a config.json names, in whichever spelling. Raises UserError where two disagree."""
    found = []
    if LAYER_IDS in (nested := config.get("eagle_config", {})):
        found.append(tuple(i + 1 for i in nested[LAYER_IDS]))
    if LAYER_IDS in config:
        found.append(tuple(config[LAYER_IDS]))
    if len(set(found)) != 1:
        raise UserError(f"config.json names the captured boundaries {found or 'nowhere'}: expected one list of them; export again")
    return found[0]


def settings_of(config: dict[str, Any]) -> DraftSettings:
    """The draft that a config.json describes."""
    return DraftSettings(
        **{name: config[name] for name in KEPT}, layers=layers_of(config), target_hidden_size=config.get("target_hidden_size")
    )


def spelled(tensors: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    """The trainer's weight names as an engine wants them."""
    return {_renamed(name, "midlayer.", "layers.0.") if to == "vllm" else name: tensor for name, tensor in tensors.items()}


def unspelled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any engine's weight names as the trainer's."""
    return {_renamed(name, "layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name
