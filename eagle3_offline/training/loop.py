"""The stage `train`: a draft head, unrolled over its own states, trained with DeepSpeed ZeRO from a sealed dump alone."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from ..config import Recipe, TrainConfig, packaged
from ..draft.held_out import measure
from ..draft.model import DraftHead
from ..draft.teacher import teacher_name, teacher_of
from ..draft.trained import TrainedDraft, is_trained, save_trained
from ..progress import StageProgress
from ..records import CheckFailed, Stopped, Summary, UserError
from ..runs import Run, StopSignal, read_json, write_json
from ..store.target_files import BASIS, carried
from . import checkpoints
from .data import Source, open_source, read_ahead
from .distributed import Ranks, all_sum, native_bfloat16, start
from .metrics import Metrics
from .step import Carried, Training, one_step

MOST_SKIPPED = 3  # steps in a row that may be skipped because their loss or gradient is not finite


def train(run: Run, recipe: Recipe, stop: StopSignal) -> Summary:
    """Train recipe.train.draft; go on from its newest checkpoint. Writes weights.safetensors (fp32) and draft.json at the end."""
    config = recipe.train
    folder = run.draft(config.draft)
    source = open_source(run.dump, config)
    run.claim(f"train.{config.draft}", settings(recipe, source))
    if is_trained(folder):
        return read_json(folder / "draft.json")["summary"]
    folder.mkdir(parents=True, exist_ok=True)
    ranks = start(config.dist_timeout)
    source = source.to(ranks.device)
    teacher = teacher_of(source.lm_head, source.target_ids, source.top_k)
    training = Training(config, source, _engine(config, source, ranks), teacher, ranks, Carried(torch.zeros(config.ttt_length)))
    summary = _steps(training, folder, stop)
    if ranks.rank == 0:
        _publish(folder, source, config, summary)
    torch.distributed.barrier()
    return summary


def settings(recipe: Recipe, source: Source) -> dict[str, Any]:
    """What a draft's weights depend on."""
    config = recipe.train
    left_out = ("eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints", "dist_timeout", "dtype", "deepspeed")
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    resolved = {"bfloat16": _bfloat16(config), "deepspeed": _deepspeed_json(config)}  # what `auto` and a file's name stand for here
    return {**chosen, **resolved, "dump": source.dump.manifest["digest"]}


# ---------------------------------------------------------------------------------------------------------------------
# Set-up


def _engine(config: TrainConfig, source: Source, ranks: Ranks) -> Any:
    import deepspeed

    head = source.new_head(config)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(
        model=head,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: rate(step, config)),
        config=_deepspeed_config(config, ranks.world),
    )
    return engine


def rate(step: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0) as a share of its peak: linear warm-up, then cosine or linear down to final_ratio."""
    warmup = max(1, round(config.warmup_ratio * config.total_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.total_steps - 1 - warmup))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_ratio + (1 - config.final_ratio) * fall


def _bfloat16(config: TrainConfig) -> bool:
    return config.dtype == "bfloat16" or (config.dtype == "auto" and native_bfloat16())


def _deepspeed_json(config: TrainConfig) -> dict[str, Any]:
    path = Path(config.deepspeed) if config.deepspeed.endswith(".json") else packaged("configs") / f"deepspeed_{config.deepspeed}.json"
    if not path.is_file():
        raise UserError(f"train.deepspeed is {config.deepspeed!r}, and {path} does not exist")
    value = json.loads(path.read_text(encoding="utf-8"))
    stage = value.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"{path} asks for ZeRO stage {stage}; expected 1, 2 or 3: the fp32 weights are read from ZeRO's checkpoints")
    return value


def _deepspeed_config(config: TrainConfig, world: int) -> dict[str, Any]:
    if config.batch_size % (world * config.micro_batch_size):
        raise UserError(
            f"train.batch_size {config.batch_size} is no multiple of {world} ranks x micro_batch_size {config.micro_batch_size}"
        )
    return {
        **_deepspeed_json(config),
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": _bfloat16(config)},
        "steps_per_print": 2**62,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _steps(training: Training, folder: Path, stop: StopSignal) -> Summary:
    config, ranks = training.config, training.ranks
    first, state = checkpoints.resume(training.engine, folder / "checkpoints")
    training.carried.load(state)
    metrics = Metrics(folder, first) if ranks.rank == 0 else None
    seconds = _read_seconds(folder, first)
    batches = read_ahead(training.source, config, ranks.rank, ranks.world, first)
    if first == 0:
        _evaluate(training, 0, metrics)  # the untrained draft
    with StageProgress("train", config.total_steps - first, "steps") as progress:
        for step in range(first, config.total_steps):
            started = time.monotonic()
            micro = next(batches)
            waited = time.monotonic() - started
            values, skipped = one_step(training, micro)
            done = step + 1
            took = time.monotonic() - started
            seconds += took
            tokens = int(all_sum(torch.tensor(sum(len(batch.tokens) for batch in micro)), ranks))
            if metrics:
                metrics.step({"step": done, **values, "tokens": tokens, "seconds": round(took, 4), "data_wait": round(waited / took, 4)})
                if skipped:
                    metrics.skipped({"step": done, **skipped})
            progress.advance(1, tokens, f"loss {values['loss']:.3f}, data wait {waited / took:.0%}")
            stopping = all_sum(torch.tensor(float(stop.received is not None)), ranks) > 0
            failing = training.carried.skipped_in_a_row > MOST_SKIPPED
            last = done == config.total_steps
            if last or (config.eval_every and done % config.eval_every == 0):
                _evaluate(training, done, metrics)
            if last or stopping or failing or done % config.checkpoint_every == 0:
                _write_seconds(folder, done, seconds, ranks)
                state = training.carried.state()
                checkpoints.save(training.engine, folder / "checkpoints", done, state, config.keep_checkpoints, ranks)
            if failing:
                raise CheckFailed(_failure(folder, done))
            if stopping and not last:
                raise Stopped(
                    f"stopped at step {done} of {config.total_steps}; the checkpoint is written, run the same command again to go on"
                )
    return {"draft": config.draft, "steps": config.total_steps, "train_seconds": round(seconds, 1), **_last_evaluation(folder)}


def _failure(folder: Path, step: int) -> str:
    return (
        f"the loss or its gradient was not finite in {MOST_SKIPPED + 1} steps in a row, up to step {step}: {folder}/skipped.jsonl "
        f"names their rows, a checkpoint is written. Look at these rows (`store verify`), or train with a lower train.learning_rate"
    )


def _evaluate(training: Training, step: int, metrics: Metrics | None) -> None:
    """Held-out measures; every rank computes the same, so that ZeRO-3's gathers stay in step."""
    config, source = training.config, training.source
    if not len(source.eval_rows):
        return
    result = measure(
        training.engine.module, source.held_out(config.eval_rows), embed=source.embed, target_ids=source.target_ids,
        chain=config.ttt_length, aux_scale=source.aux_scale, teacher=training.teacher,
    )  # fmt: skip
    if metrics:
        metrics.evaluation({"step": step, **result.summary(), "teacher": teacher_name(source.top_k)})


# ---------------------------------------------------------------------------------------------------------------------
# Results


def _publish(folder: Path, source: Source, config: TrainConfig, summary: Summary) -> None:
    weights = checkpoints.fp32_weights(folder / "checkpoints", summary["steps"])
    about = {
        "dump": source.dump.manifest["digest"],
        "target": source.dump.spec.target,
        "train": dataclasses.asdict(config),
        "summary": summary,
    }
    basis = (source.dump.target / BASIS).read() if source.dump.spec.compact else None
    draft = TrainedDraft(DraftHead(source.settings), source.vocabulary, source.aux_scale, about, basis)
    save_trained(folder, weights, draft, carried(source.dump.where))


def _last_evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "held_out.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {"tau": json.loads(lines[-1])["tau"]} if lines else {}


def _read_seconds(folder: Path, step: int) -> float:
    """Seconds of training behind a checkpoint, over all resumes."""
    path = folder / "checkpoints" / "seconds.json"
    return read_json(path).get(str(step), 0.0) if step and path.is_file() else 0.0


def _write_seconds(folder: Path, step: int, seconds: float, ranks: Ranks) -> None:
    if ranks.rank == 0:
        path = folder / "checkpoints" / "seconds.json"
        write_json(path, {**(read_json(path) if path.is_file() else {}), str(step): seconds})
