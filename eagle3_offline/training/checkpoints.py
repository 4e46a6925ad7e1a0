"""Checkpoints of a draft: written aside, renamed whole, the newest and the pinned ones kept; and fp32 weights out of them.

A checkpoint resumes exactly on as many ranks as wrote it. On another number of ranks it is first rewritten as DeepSpeed's universal
checkpoint, which keeps the optimiser's state and whose losses differ by rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..records import UserError
from ..runs import fsync_path, read_json, write_json
from .distributed import Ranks

ABOUT = "about.json"  # in a checkpoint: its format, and the ranks and the ZeRO stage that wrote it
FORMAT = 2  # which parameters the optimiser holds together


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from; step 0: there is none."""

    step: int
    folder: Path
    universal: bool = False


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay: so many of the newest, and those that were ever saved with a pin."""

    newest: int
    pins: list[str]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def finished_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.is_dir())


def pinned(folder: Path) -> dict[str, int]:
    """Pin -> step."""
    path = folder / "pinned.json"
    return read_json(path) if path.is_file() else {}


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], kept: Kept, ranks: Ranks, stage: int) -> None:
    """Save a checkpoint under a temporary name, rename it when every rank has written, then drop old ones."""
    aside = folder / ".tmp"
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(aside), tag=step_name(step), client_state={**state, "step": step}, save_latest=False)
    torch.distributed.barrier()
    if ranks.rank == 0:
        write_json(aside / step_name(step) / ABOUT, {"format": FORMAT, "world": ranks.world, "zero_stage": stage})
        for path in aside.rglob("*"):
            fsync_path(path)
        shutil.rmtree(folder / step_name(step), ignore_errors=True)
        (aside / step_name(step)).rename(folder / step_name(step))
        fsync_path(folder)
        if kept.pins:
            write_json(folder / "pinned.json", {**pinned(folder), **dict.fromkeys(kept.pins, step)})
        _prune(folder, kept.newest)
    torch.distributed.barrier()


def _prune(folder: Path, newest: int) -> None:
    pins = pinned(folder).values()
    for old in finished_steps(folder)[:-newest]:
        if old not in pins:
            shutil.rmtree(folder / step_name(old))


def newest(folder: Path, ranks: Ranks, stage: int) -> Saved:
    """The newest checkpoint, rewritten where other ranks wrote it. A collective: every rank calls it."""
    steps = finished_steps(folder)
    if not steps:
        return Saved(0, folder)
    name = step_name(steps[-1])
    about = read_json(folder / name / ABOUT) if (folder / name / ABOUT).is_file() else {}
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / name} was written by an earlier version, in another format: remove {folder} and train again")
    if about["zero_stage"] != stage:
        raise UserError(f"{folder / name} was written with ZeRO stage {about['zero_stage']}, now it is {stage}: go on with the old stage")
    if about["world"] == ranks.world or stage == 0:  # without ZeRO each rank holds all
        return Saved(steps[-1], folder)
    elastic = folder / "universal"
    if ranks.rank == 0:
        shutil.rmtree(elastic, ignore_errors=True)
        _make_universal(folder / name, elastic / name)
    torch.distributed.barrier()
    return Saved(steps[-1], elastic, universal=True)


def _make_universal(source: Path, to: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as convert

    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(to),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    to.mkdir(parents=True)
    with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for the summary
        convert(options)


def load(engine: Any, saved: Saved) -> dict[str, Any]:
    """Load a checkpoint into the engine; return the state saved with it."""
    if not saved.step:
        return {}
    path, state = engine.load_checkpoint(str(saved.folder), tag=step_name(saved.step))
    if path is None or state["step"] != saved.step:
        where = f"{saved.folder}/{step_name(saved.step)}"
        raise RuntimeError(f"{where} could not be loaded; remove it to go on from the one before")
    return state


def fp32_weights(folder: Path, step: int, stage: int) -> dict[str, Tensor]:
    """The fp32 master weights of a checkpoint, whatever ZeRO stage wrote it.

    From stage 1 on, DeepSpeed reads its own files here as in a resume, and unpickles them whole: only load checkpoints that you trust.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if stage == 0:
        state = torch.load(folder / step_name(step) / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
    else:
        with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for the summary
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=step_name(step))
    return {name: tensor.detach().float().clone().contiguous() for name, tensor in state.items()}
