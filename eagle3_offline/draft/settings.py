"""Shape of a draft, derived from the target's config.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..records import UserError

MLP_MULTIPLE = 16  # a narrower draft's MLP width is rounded up to one
OWN_SHAPE = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")  # no matter to the target
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """All that decides the draft's tensors and arithmetic. Rope, norms and head counts are the target's own."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    layers: tuple[int, ...]  # boundary indices of the captured layers, low to high
    rms_norm_eps: float
    rope_parameters: dict[str, Any]  # rope_type, rope_theta and the scaling's own keys, as transformers 5 writes them
    max_position_embeddings: int
    hidden_act: str = "silu"
    fc_norm: bool = False  # EAGLE-3.1: a norm of each captured state before fc
    norm_output: bool = False  # EAGLE-3.1: the state after the final norm recurs, not the one before it
    target_hidden_size: int | None = None  # of a narrower draft, which owns its embedding; None: hidden_size
    rank: int | None = None  # channels of the projection that fc reads, in training from a compact dump; None: the captured states

    @property
    def target_width(self) -> int:
        """Width of each captured state."""
        return self.target_hidden_size or self.hidden_size

    @property
    def owns_embedding(self) -> bool:
        """Whether the draft has an embedding of its own; else it reads the target's."""
        return self.target_hidden_size is not None

    @property
    def aux_width(self) -> int:
        """Width of what fc reads: the concatenated captured states, or their projection."""
        return self.rank or len(self.layers) * self.target_width

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DraftSettings:
        return cls(**{**value, "layers": tuple(value["layers"])})


def draft_settings(
    target_config: dict[str, Any],
    layers: tuple[int, ...],
    draft_vocab_size: int,
    *,
    fc_norm: bool = False,
    norm_output: bool = False,
    hidden_size: int = 0,
) -> DraftSettings:
    """The draft that fits a target: one Llama layer of the target's own shape, or narrowed to hidden_size (0: the target's).

    `target_config` is its config.json.
    """
    config = target_config.get("text_config", target_config)
    heads = config["num_attention_heads"]
    whole = DraftSettings(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        draft_vocab_size=min(draft_vocab_size, config["vocab_size"]),
        layers=tuple(layers),
        rms_norm_eps=config.get("rms_norm_eps") or config["layer_norm_eps"],  # Cohere's norms are of the other kind
        rope_parameters=rope_parameters(config),
        max_position_embeddings=config["max_position_embeddings"],
        fc_norm=fc_norm,
        norm_output=norm_output,
    )
    return whole if hidden_size in (0, whole.hidden_size) else narrowed(whole, hidden_size)


def narrowed(whole: DraftSettings, hidden_size: int) -> DraftSettings:
    """A narrower draft: heads, key/value heads and the MLP shrink with the width; head_dim and the heads of a group stay the target's."""
    if hidden_size > whole.hidden_size:
        raise UserError(f"train.hidden_size is {hidden_size}, the target's {whole.hidden_size}: a draft is at most as wide as its target")
    share = hidden_size / whole.hidden_size
    kv_heads = max(1, round(whole.num_key_value_heads * share))
    heads = kv_heads * (whole.num_attention_heads // whole.num_key_value_heads)
    if hidden_size % heads:  # as LlamaConfig demands, in transformers and in the engines
        raise UserError(f"train.hidden_size is {hidden_size}; a draft so wide has {heads} heads: choose a multiple of {heads}")
    return replace(
        whole,
        hidden_size=hidden_size,
        target_hidden_size=whole.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=math.ceil(whole.intermediate_size * share / MLP_MULTIPLE) * MLP_MULTIPLE,
    )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The target's rotary embedding as transformers 5 writes it, from either spelling.

    `dynamic` becomes `default`: up to max_position_embeddings, the longest row there can be, transformers' angles are the same;
    engines build another, fixed table for `dynamic`, which a draft that was trained on these angles may not be served with.
    """
    rope = config.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"the target has a rotary embedding for each kind of layer ({', '.join(rope)}); only targets with one are supported"
        )
    if "type" in rope:  # as configs of transformers 4 spell it
        rope = {"rope_type": rope["type"], **{key: value for key, value in rope.items() if key not in ("type", "rope_type")}}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise UserError(f"the target's rope_type is {rope['rope_type']!r}; supported so far are {', '.join(ROPE_TYPES)}")
    if (share := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        raise UserError(
            f"the target rotates a share of {share} of each head (partial_rotary_factor); only whole heads are supported so far"
        )
    if rope.get("rope_type") == "dynamic":
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope
