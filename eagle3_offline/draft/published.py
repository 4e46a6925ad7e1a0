"""A published draft as a start: a folder in SGLang's, vLLM's or the official EAGLE-3 layout (pytorch_model.bin, no layer ids).

Its vocabulary map and the shape of its layer are kept; what ties it to the target must be the dump's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load
from torch import Tensor

from ..records import UserError
from ..runs import read_json
from .layout import LAYER_IDS, layers_of, unspelled
from .model import DraftHead
from .settings import DraftSettings, rope_parameters

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
NEUTRAL = {  # keys of config.json: the value that the arithmetic here has
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "norm_before_residual": False,
    "norm_before_fc": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
}
SAME_EMBEDDING = 0.01  # largest difference to the target's, as a share of its largest value: both may be rounded to half precision


@dataclass(frozen=True)
class Published:
    """A draft that is there, with the trainer's names; its fc reads the captured states as they are."""

    folder: Path
    settings: DraftSettings
    target_ids: Tensor  # [D] int64
    tensors: dict[str, Tensor]  # fp32
    embed: Tensor | None  # [V, H] the target's embedding, where the folder holds it
    digest: str  # of its weights

    def head(self, aux_scale: Tensor | None) -> DraftHead:
        """The draft with an fc that reads channels multiplied by aux_scale [A]: the same logits as the published one's."""
        head = DraftHead(self.settings)
        fc = self.tensors["fc.weight"]
        head.load_state_dict({**self.tensors, "fc.weight": fc if aux_scale is None else fc / aux_scale}, strict=True)
        return head


def read_published(folder: Path, target_config: dict[str, Any]) -> Published:
    """Read a draft's folder. UserError where it is none, or one of another arithmetic. target_config: the target's config.json."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None or not (folder / "config.json").is_file():
        raise UserError(f"train.start_from is {folder}: expected a folder with config.json and one of {', '.join(WEIGHTS)}")
    config = read_json(folder / "config.json")
    nested = config.get("eagle_config") or {}
    for key, neutral in NEUTRAL.items():
        if (value := nested.get(key, config.get(key))) not in (None, neutral):
            raise UserError(f"{folder}/config.json has {key} = {value!r}; a draft here has {neutral!r}, so it can't be trained on")
    data = path.read_bytes()
    tensors = load(data) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    tensors = unspelled(tensors)
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    settings = _settings(folder, config, tensors, target_config.get("text_config", target_config))
    embed = None if settings.owns_embedding else tensors.pop("embed_tokens.weight", None)
    expected = {name: tensor.shape for name, tensor in _meta(settings).items()}
    if problem := _differences(tensors, expected):
        raise UserError(f"{path} does not hold the draft that its config.json describes: {problem}")
    return Published(
        folder=folder,
        settings=settings,
        target_ids=_target_ids(path, d2t, t2d, settings),
        tensors={name: tensor.float() for name, tensor in tensors.items()},
        embed=embed,
        digest=xxhash.xxh3_128_hexdigest(data),
    )


def _settings(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], target: dict[str, Any]) -> DraftSettings:
    """What a draft's config.json says, with the defaults that its readers have."""
    if missing := [name for name in ("fc.weight", "lm_head.weight", "norm.weight") if name not in tensors]:
        raise UserError(f"{folder} holds no EAGLE-3 draft: {', '.join(missing)} are not among its weights")
    named = LAYER_IDS in config or LAYER_IDS in (config.get("eagle_config") or {})
    depth = target["num_hidden_layers"]
    hidden, heads, of_target = config["hidden_size"], config["num_attention_heads"], config.get("target_hidden_size")
    return DraftSettings(
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        draft_vocab_size=len(tensors["lm_head.weight"]),
        layers=layers_of(config) if named else (2, depth // 2, depth - 3),  # those of the official code, which names none
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_parameters=rope_parameters(config),
        max_position_embeddings=target["max_position_embeddings"],
        fc_norm=bool(config.get("fc_norm")),
        norm_output=bool(config.get("norm_output")),
        target_hidden_size=None if of_target in (None, hidden) else of_target,
    )


def _meta(settings: DraftSettings) -> dict[str, Tensor]:
    with torch.device("meta"):
        return DraftHead(settings).state_dict()


def _differences(tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> str:
    """Names and shapes that differ from what is expected, in words."""
    lines = [f"{name} is missing" for name in expected if name not in tensors]
    lines += [f"{name} is unexpected" for name in tensors if name not in expected]
    lines += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return "; ".join(lines)


def _target_ids(path: Path, d2t: Tensor | None, t2d: Tensor | None, settings: DraftSettings) -> Tensor:
    size = settings.draft_vocab_size
    if d2t is None and size != settings.vocab_size:
        raise UserError(f"{path} has no d2t, though its lm_head has {size} rows of the vocabulary's {settings.vocab_size}")
    target_ids = torch.arange(size) + (0 if d2t is None else d2t.long())
    if t2d is not None and not torch.equal(t2d.bool().nonzero()[:, 0], target_ids):
        raise UserError(f"{path}: d2t and t2d name different tokens, or not in ascending order")
    return target_ids


def fit(published: Published, wanted: DraftSettings, held: tuple[int, ...]) -> Published:
    """The published draft, ready for a target. UserError that names both sides where it belongs to another.

    wanted: the draft that the recipe and the dump's target ask for, with the layers that it reads; held: the layers that the dump holds.
    """
    found, problems = published.settings, []
    for name in ("hidden_size", "target_hidden_size", "vocab_size", "rope_parameters", "fc_norm", "norm_output", "layers"):
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if ours != theirs:
            problems.append(f"{name} is {theirs!r} in the draft, {ours!r} by the recipe and the dump's target")
    if found.rope_parameters != wanted.rope_parameters:
        problems.append("to train it on with the target's rotary embedding, write that into the draft's config.json")
    if missing := sorted({*found.layers} - {*held}):
        problems.append(f"the draft reads the boundaries {missing}, the dump holds {list(held)}")
    if problems:
        raise UserError(f"train.start_from is {published.folder}, which was made for something else:\n" + "\n".join(problems))
    return replace(published, settings=replace(found, max_position_embeddings=wanted.max_position_embeddings))


def same_embedding(published: Published, embed: Tensor) -> None:
    """UserError where the folder holds another embedding than the target's [V, H], which the draft would be trained with."""
    if published.embed is None:
        return
    theirs, ours = published.embed.float(), embed.float()
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > SAME_EMBEDDING * ours.abs().max():
        raise UserError(
            f"{published.folder} holds an embedding that is not the target's; drafts as wide as the target read the target's: "
            f"it was made for another target, or has trained the embedding"
        )
