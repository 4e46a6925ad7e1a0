"""The DeepSpeed engine of a training, from the recipe and a DeepSpeed JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig, packaged
from ..draft.model import DraftHead
from ..records import UserError
from .distributed import Ranks, native_bfloat16

GROUP_ELEMENTS = 2**22  # 16 MiB in fp32, of which glibc keeps freed blocks


def build(config: TrainConfig, head: DraftHead, ranks: Ranks, universal: bool) -> Any:
    """The engine around a head; `universal`: it will load a checkpoint that other ranks wrote."""
    import deepspeed

    optimizer = torch.optim.AdamW(
        _groups(list(head.parameters())), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=head,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: rate(step, config)),
        config={**engine_config(config, ranks.world), "checkpoint": {"load_universal": universal}},
    )
    return engine


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """The optimiser's groups: neighbours of up to GROUP_ELEMENTS, one alone where it is larger.

    ZeRO applies a group after the other and makes its gradient in fp32 for that; of one group for all this would be the draft once
    more, in a block that a CPU's allocator gives back at once, so that every step would be handed new pages for it.
    """
    groups: list[list[nn.Parameter]] = []
    for parameter in parameters:
        if groups and sum(p.numel() for p in groups[-1]) + parameter.numel() <= GROUP_ELEMENTS:
            groups[-1].append(parameter)
        else:
            groups.append([parameter])
    return [{"params": group} for group in groups]


def rate(step: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0) as a share of its peak: linear warm-up, then cosine or linear down to final_ratio."""
    warmup = max(1, round(config.warmup_ratio * config.total_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.total_steps - 1 - warmup))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_ratio + (1 - config.final_ratio) * fall


def uses_bfloat16(config: TrainConfig) -> bool:
    """What train.dtype stands for on this machine."""
    return config.dtype == "bfloat16" or (config.dtype == "auto" and native_bfloat16())


def zero_stage(config: TrainConfig) -> int:
    """Stage of ZeRO in the DeepSpeed JSON."""
    return deepspeed_json(config).get("zero_optimization", {}).get("stage", 0)


def deepspeed_json(config: TrainConfig) -> dict[str, Any]:
    """The content of the DeepSpeed JSON that the recipe names."""
    path = Path(config.deepspeed) if config.deepspeed.endswith(".json") else packaged("configs") / f"deepspeed_{config.deepspeed}.json"
    if not path.is_file():
        raise UserError(f"train.deepspeed is {config.deepspeed!r}, and {path} does not exist")
    value = json.loads(path.read_text(encoding="utf-8"))
    stage = value.get("zero_optimization", {}).get("stage", 0)
    if value.get("comet", {}).get("api_key"):  # the resolved JSON is kept in the run folder
        raise UserError(f"{path} holds comet's api_key, which would be copied into the run folder: set COMET_API_KEY instead")
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path} asks for ZeRO stage {stage}; expected 0, 1, 2 or 3")
    if stage == 0 and uses_bfloat16(config):
        raise UserError(f"{path} asks for ZeRO stage 0, which has no fp32 masters for bfloat16: use stage 1, or train.dtype float32")
    return value


def engine_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """What DeepSpeed is given."""
    micro = 1 if config.micro_batch_tokens else config.micro_batch_size
    if config.batch_size % (world * micro):
        raise UserError(f"train.batch_size {config.batch_size} is no multiple of {world} ranks x micro_batch_size {micro}")
    return {
        **deepspeed_json(config),
        "train_micro_batch_size_per_gpu": 1,  # one_step says itself which micro-batch is a step's last: a step's number of them varies
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": uses_bfloat16(config)},
        "steps_per_print": 2**62,
    }
