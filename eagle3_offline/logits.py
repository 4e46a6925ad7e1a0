"""What a target does to W h, its head's weight times its normed last state: logits = cap * tanh(scale * (W h + bias) / cap).

Legend: n rows, V vocabulary. The arrays are torch tensors; nothing is imported for them, so that every part may use this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .records import UserError

SCALES = {"logit_scale": 1, "logits_scaling": -1}  # Cohere multiplies by it, Granite divides
CAP = "final_logit_softcapping"  # Gemma 2 and later
DEFAULTS = {  # of families whose config.json may leave the key out
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625},
    "cohere2_moe": {"logit_scale": 0.0625},
    "gemma2": {CAP: 30.0},
    "gemma3n_text": {CAP: 30.0},
    "nanochat": {CAP: 15.0},
    "vaultgemma": {CAP: 30.0},
}
UNKNOWN = {  # key: the value that does nothing
    "logits_soft_cap": None,
    "lm_head_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
    "dim_model_base": None,
    "mup_width_scale": 1.0,
    "mup_width_multiplier": None,
}


@dataclass(frozen=True)
class HeadTransform:
    """Logits of W h. Scale and cap keep the order of the logits; the bias does not."""

    scale: float = 1.0
    cap: float | None = None
    bias: Any = None  # [V] fp32

    def ranked(self, products: Any, tokens: Any = slice(None)) -> Any:
        """W h [n, m] of the tokens `tokens` with the bias: in the order of the logits."""
        return products if self.bias is None else products + self.bias[tokens]

    def __call__(self, products: Any, tokens: Any = slice(None)) -> Any:
        """Logits [n, m] of W h [n, m] of the tokens `tokens`."""
        logits = self.ranked(products, tokens)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def to(self, device: Any) -> HeadTransform:
        """The same with its bias on a device."""
        return self if self.bias is None else HeadTransform(self.scale, self.cap, self.bias.to(device))


def head_transform(config: dict[str, Any], bias: Any = None) -> HeadTransform:
    """The transform that a target's config.json describes, with its lm_head.bias [V]. Raises UserError for what is not known."""
    config = config.get("text_config", config)
    config = {**DEFAULTS.get(config.get("model_type"), {}), **config}
    for key, neutral in UNKNOWN.items():
        if config.get(key) not in (None, neutral):
            raise UserError(
                f"the target's config has {key} = {config[key]}, which changes its logits in a way that is not supported: a teacher is "
                f"the softmax of W h with a bias, a scale ({', '.join(SCALES)}) or a soft cap ({CAP})"
            )
    found = {key: config[key] for key in (*SCALES, CAP) if config.get(key) not in (None, 1.0)}
    scales = [value ** SCALES[key] for key, value in found.items() if key in SCALES]
    if any(value <= 0 for value in found.values()) or len(found) > 1:
        raise UserError(f"the target's config has {found}; expected at most one of these, above 0")
    return HeadTransform(scales[0] if scales else 1.0, found.get(CAP), None if bias is None else bias.float())
