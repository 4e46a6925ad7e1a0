"""`export --check`: the exported draft against the trainer's, and its config against the dump."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ..records import Summary, UserError
from .export import read_config, read_export
from .layout import settings_of
from .model import DraftHead
from .serving import ChainDrafter
from .settings import OWN_SHAPE, draft_settings
from .trained import TrainedDraft, load_trained

ROWS, CHAIN = 24, 4  # of the conversation that both drafts read
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # of the logits' norm; weights are rounded to this dtype


def check_export(draft_folder: Path, manifest: Mapping[str, Any], target_config: Mapping[str, Any]) -> Summary:
    """Compare draft_folder/export with the trained draft and with the dump that it was trained from. Raises UserError with all problems.

    manifest: the dump's; target_config: the target's config.json, as the dump carries it.
    """
    folder = draft_folder / "export"
    trained, config = load_trained(draft_folder), read_config(folder)
    head, target_ids = read_export(folder)
    problems = _config_problems(config, trained, manifest, target_config)
    if not torch.equal(target_ids, trained.target_ids):
        problems.append(f"its draft vocabulary differs from the trained one's in {int((target_ids != trained.target_ids).sum())} places")
    difference = logits_difference(trained, head)
    if not difference <= TOLERANCE[config["torch_dtype"]]:
        allowed = TOLERANCE[config["torch_dtype"]]
        problems.append(f"its logits differ from the trainer's by {difference:.2g} of their norm; expected at most {allowed:g}")
    if problems:
        raise UserError(f"{folder} is not the draft that was trained, export it again:\n" + "\n".join(problems))
    return {"folder": str(folder), "logits_difference": difference, "dump": manifest["digest"], "problems": 0}


def _config_problems(
    config: dict[str, Any], trained: TrainedDraft, manifest: Mapping[str, Any], target_config: Mapping[str, Any]
) -> list[str]:
    """Every value of config.json that differs from what the dump and the training ask for."""
    settings = trained.head.settings
    chosen = {name: getattr(settings, name) for name in ("fc_norm", "norm_output", "hidden_size")}
    layers, size = settings.layers, len(trained.target_ids)
    expected = asdict(draft_settings(dict(target_config), layers, size, **chosen))
    if trained.about["train"].get("start_from"):  # a published draft brings these along
        expected |= {name: getattr(settings, name) for name in OWN_SHAPE}
    found = asdict(settings_of(config))
    problems = [
        f"{name} is {found[name]!r}, expected {expected[name]!r}" for name in expected if _plain(found[name]) != _plain(expected[name])
    ]
    if unknown := {*layers} - {*manifest["spec"]["layers"]}:
        problems.append(f"the draft reads the boundaries {sorted(unknown)}, which the dump does not hold")
    if (digest := config["eagle3_offline"]["dump"]) != manifest["digest"]:
        problems.append(f"it was trained on the dump {digest}, the dump here is {manifest['digest']}")
    return problems


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@torch.no_grad()
def logits_difference(trained: TrainedDraft, exported: DraftHead) -> float:
    """Norm of the difference of both drafts' logits, as a share of the norm, on a seeded made-up conversation of the right scale."""
    settings = exported.settings
    generator = torch.Generator().manual_seed(0)
    scaled = torch.randn(ROWS, len(settings.layers) * settings.target_width, generator=generator)
    raw = scaled * _channel_sizes(trained, scaled.shape[1])
    embed = torch.randn(settings.vocab_size, settings.hidden_size, generator=generator) * 0.1
    tokens = torch.randint(settings.vocab_size, (ROWS + CHAIN,), generator=generator)
    read = torch.from_numpy(trained.project(raw.numpy()))
    read = read if trained.aux_scale is None else read * trained.aux_scale
    found = []
    for head, aux in ((trained.head, read), (exported, raw)):
        drafter = ChainDrafter(head, embed, trained.target_ids)
        drafter.extend(aux, tokens[:ROWS])
        found.append(torch.stack(drafter.chain_logits(tokens[ROWS:].tolist(), CHAIN)))
    return float((found[0] - found[1]).norm() / found[0].norm())


def _channel_sizes(trained: TrainedDraft, channels: int) -> Tensor:
    """What the captured channels are about as large as: [n_aux * H]."""
    if trained.basis is not None:
        return load(trained.basis)["scale"]
    return torch.ones(channels) if trained.aux_scale is None else 1 / trained.aux_scale
