"""Checkpoints of a draft: written aside, renamed whole, the newest ones kept; and fp32 weights out of them."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runs import fsync_path
from .distributed import Ranks


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def finished_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.is_dir())


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], keep: int, ranks: Ranks) -> None:
    """Save a checkpoint under a temporary name, rename it when every rank has written, then drop old ones."""
    aside = folder / ".tmp"
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(aside), tag=step_name(step), client_state={**state, "step": step}, save_latest=False)
    torch.distributed.barrier()
    if ranks.rank == 0:
        for path in aside.rglob("*"):
            fsync_path(path)
        shutil.rmtree(folder / step_name(step), ignore_errors=True)
        (aside / step_name(step)).rename(folder / step_name(step))
        fsync_path(folder)
        for old in finished_steps(folder)[:-keep]:
            shutil.rmtree(folder / step_name(old))
    torch.distributed.barrier()


def resume(engine: Any, folder: Path) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint; return the number of finished steps (0 where there is none) and the state saved with it."""
    steps = finished_steps(folder)
    if not steps:
        return 0, {}
    path, state = engine.load_checkpoint(str(folder), tag=step_name(steps[-1]))
    if path is None or state["step"] != steps[-1]:
        raise RuntimeError(f"{folder}/{step_name(steps[-1])} could not be loaded; remove it to go on from the one before")
    return steps[-1], state


def fp32_weights(folder: Path, step: int) -> dict[str, Tensor]:
    """The fp32 master weights of a checkpoint, whatever ZeRO stage wrote it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for the summary
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=step_name(step))
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
