"""Shape of a draft, derived from the target's config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..records import UserError

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
    rank: int | None = None  # channels of the projection that fc reads, in training from a compact dump; None: the captured states

    @property
    def aux_width(self) -> int:
        """Width of what fc reads: the concatenated captured states, or their projection."""
        return self.rank or len(self.layers) * self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DraftSettings:
        return cls(**{**value, "layers": tuple(value["layers"])})


def draft_settings(
    target_config: dict[str, Any], layers: tuple[int, ...], draft_vocab_size: int, *, fc_norm: bool = False, norm_output: bool = False
) -> DraftSettings:
    """The draft that fits a target: one Llama layer of the target's own shape. `target_config` is its config.json."""
    config = target_config.get("text_config", target_config)
    heads = config["num_attention_heads"]
    return DraftSettings(
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
