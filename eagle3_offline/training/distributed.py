"""Ranks and DeepSpeed's start-up, on a GPU or a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from ..machine import cpu_multiplies_bfloat16, free_port
from ..records import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device


def start(timeout_minutes: float) -> Ranks:
    """Join the process group: torchrun's or DeepSpeed's variables, else srun's, else a group of one."""
    env = os.environ
    env.setdefault("RANK", env.get("SLURM_PROCID", "0") if "SLURM_STEP_ID" in env else "0")
    env.setdefault("WORLD_SIZE", env.get("SLURM_NTASKS", "1") if "SLURM_STEP_ID" in env else "1")
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0") if "SLURM_STEP_ID" in env else "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", str(free_port()))
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        # Kernels that bfloat16 products keep: about those of all row counts (draft/products.py). Read at the process's first product.
        env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "160")
    elif int(env["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise UserError(f"rank {env['LOCAL_RANK']} (from 0) has no GPU: its node has {torch.cuda.device_count()}; start fewer ranks")
    # Else cuBLAS may add up parts of a bfloat16 product that are rounded themselves; draft/teacher.py relies on one rounding.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    import deepspeed

    # On a CPU DeepSpeed would compile this operator for a minute and never use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=timeout_minutes))
    device = torch.device("cuda", int(env["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), device)


def all_sum(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum of a small tensor over all ranks."""
    if ranks.world > 1:
        values = values.to(ranks.device)
        torch.distributed.all_reduce(values)
    return values.cpu()


def all_list(values: list, ranks: Ranks) -> list:
    """The values of all ranks, one rank after the other."""
    if ranks.world == 1:
        return values
    found: list = [None] * ranks.world
    torch.distributed.all_gather_object(found, values)
    return [value for part in found for value in part]


def native_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 natively."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else cpu_multiplies_bfloat16()
