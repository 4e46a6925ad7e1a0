"""The stage `train`: a draft head, unrolled over its own states, trained with DeepSpeed ZeRO from a sealed dump alone."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from ..config import Recipe
from ..draft.held_out import measure
from ..draft.layout import refuse_unservable
from ..draft.model import DraftHead
from ..draft.teacher import teacher_name, teacher_of
from ..draft.trained import TrainedDraft, is_trained, save_trained
from ..progress import StageProgress
from ..records import CheckFailed, Stopped, Summary
from ..runs import Run, StopSignal, read_json
from ..store.target_files import BASIS, carried
from . import checkpoints
from .data import Source, open_source, read_ahead
from .distributed import all_sum, start
from .engine import build, deepspeed_json, uses_bfloat16, zero_stage
from .metrics import Metrics
from .order import epochs_done
from .ridge import start_fc
from .step import Carried, Training, one_step
from .trackers import Trackers, require_packages

MOST_SKIPPED = 3  # steps in a row that may be skipped because their loss or gradient is not finite
NO_SETTING = (  # of the weights: what may differ when a training goes on
    "eval_every",
    "eval_rows",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_epochs",
    "dist_timeout",
    "dtype",
    "deepspeed",
    "attention",
    "checkpoint_activations",
    "micro_batch_tokens",
)


def train(run: Run, recipe: Recipe, stop: StopSignal) -> Summary:
    """Train recipe.train.draft; go on from its newest checkpoint. Writes weights.safetensors (fp32) and draft.json at the end."""
    config = recipe.train
    folder = run.draft(config.draft)
    require_packages(recipe)
    source = open_source(run.dump, config)
    refuse_unservable(source.settings.layers, recipe.export.to, source.dump.target_json("config.json"))
    run.claim(f"train.{config.draft}", settings(recipe, source))
    if is_trained(folder):
        return read_json(folder / "draft.json")["summary"]
    folder.mkdir(parents=True, exist_ok=True)
    ranks = start(config.dist_timeout)
    source = source.to(ranks.device)
    teacher = teacher_of(source.lm_head, source.target_ids, source.top_k, source.transform)
    saved = checkpoints.newest(folder / "checkpoints", ranks, zero_stage(config))
    head = source.new_head(config)
    if config.fc_init == "ridge" and not saved.step:
        start_fc(source, head)
    head.attention, head.checkpoint_activations = config.attention, config.checkpoint_activations
    engine = build(config, head, ranks, saved.universal)
    training = Training(config, source, engine, teacher, ranks, Carried(torch.zeros(config.ttt_length)))
    training.carried.load(checkpoints.load(engine, saved))
    steps = _steps(training, folder, saved.step, stop, Trackers(recipe, folder))
    summary = _summary(training, folder, steps)
    if ranks.rank == 0:
        _publish(training, folder, summary)
    torch.distributed.barrier()
    return summary


def settings(recipe: Recipe, source: Source) -> dict[str, Any]:
    """What a draft's weights depend on."""
    config = recipe.train
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_SETTING}
    resolved = {"bfloat16": uses_bfloat16(config), "deepspeed": deepspeed_json(config)}  # what `auto` and a file's name stand for here
    resolved["start_from"] = source.published and source.published.digest  # whatever its folder is called
    return {**chosen, **resolved, "dump": source.dump.manifest["digest"]}


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _steps(training: Training, folder: Path, first: int, stop: StopSignal, trackers: Trackers) -> int:
    """Train from step `first` on; the number of steps that are done when the training is over."""
    config, ranks, carried = training.config, training.ranks, training.carried
    metrics = Metrics(folder, first, trackers) if ranks.rank == 0 else None
    batches = read_ahead(training.source, config, ranks.rank, ranks.world, first)
    done = first
    if first == 0:
        _evaluate(training, 0, metrics)  # the untrained draft
    with StageProgress("train", training.steps - first, "steps") as progress:
        while done < training.steps and not carried.stalled(config.early_stop):
            started = time.monotonic()
            micro = next(batches)
            waited = time.monotonic() - started
            values, skipped = one_step(training, micro)
            done += 1
            took = time.monotonic() - started
            carried.seconds += took
            tokens = int(all_sum(torch.tensor(sum(len(batch.tokens) for batch in micro)), ranks))
            if metrics:
                metrics.step({"step": done, **values, "tokens": tokens, "seconds": round(took, 4), "data_wait": round(waited / took, 4)})
                if skipped:
                    metrics.skipped({"step": done, **skipped})
            progress.advance(1, tokens, f"loss {values['loss']:.3f}, data wait {waited / took:.0%}")
            if done == training.steps or (config.eval_every and done % config.eval_every == 0):
                _evaluate(training, done, metrics)
            _after(training, folder, done, stop)
    return done


def _after(training: Training, folder: Path, done: int, stop: StopSignal) -> None:
    """The checkpoint of a step where there is a reason for one. Raises where a signal or too many skipped steps end the training."""
    config, ranks, carried = training.config, training.ranks, training.carried
    stopping = all_sum(torch.tensor(float(stop.received is not None)), ranks) > 0
    failing = carried.skipped_in_a_row > MOST_SKIPPED
    over = done == training.steps or carried.stalled(config.early_stop)
    pins = _pins(training, done)
    if over or stopping or failing or pins or done % config.checkpoint_every == 0:
        kept = checkpoints.Kept(config.keep_checkpoints, pins)
        checkpoints.save(training.engine, folder / "checkpoints", done, carried.state(), kept, ranks, zero_stage(config))
    if failing:
        raise CheckFailed(
            f"the loss or its gradient was not finite in {MOST_SKIPPED + 1} steps in a row, up to step {done}: {folder}/skipped.jsonl "
            f"names their rows, a checkpoint is written. Look at these rows (`store verify`), or train with a lower train.learning_rate"
        )
    if stopping and not over:
        raise Stopped(f"stopped at step {done} of {training.steps}; the checkpoint is written, run the same command again to go on")


def _pins(training: Training, done: int) -> list[str]:
    """Names under which a step's checkpoint is kept for good: the best so far, the end of an epoch."""
    config, taus = training.config, training.carried.taus
    pins = []
    if config.publish == "best" and taus and taus[-1][0] == done and training.carried.best == done:
        pins.append("best")
    epoch = epochs_done(done, config.batch_size, len(training.source.train_rows))
    if config.keep_epochs and epoch > epochs_done(done - 1, config.batch_size, len(training.source.train_rows)):
        pins.append(f"epoch-{epoch}")
    return pins


def _evaluate(training: Training, step: int, metrics: Metrics | None) -> None:
    """Held-out measures; every rank computes the same, so that ZeRO-3's gathers stay in step."""
    config, source = training.config, training.source
    if not len(source.eval_rows):
        return
    result = measure(
        training.engine.module, source.held_out(config.eval_rows), embed=source.embed, target_ids=source.target_ids,
        chain=config.ttt_length, aux_scale=source.aux_scale, teacher=training.teacher,
    )  # fmt: skip
    if step and result.walk.tau is not None:
        training.carried.taus.append((step, result.walk.tau))
    if metrics:
        metrics.evaluation({"step": step, **result.summary(), "teacher": teacher_name(source.top_k)})


# ---------------------------------------------------------------------------------------------------------------------
# Results


def _summary(training: Training, folder: Path, steps: int) -> Summary:
    config, carried = training.config, training.carried
    found = {"draft": config.draft, "steps": steps, "train_seconds": round(carried.seconds, 1)}
    if carried.taus:
        published = carried.best if config.publish == "best" else carried.taus[-1][0]
        found |= {"tau": dict(carried.taus)[published]}
        if config.publish == "best":
            found["best_step"] = published
    return found


def _publish(training: Training, folder: Path, summary: Summary) -> None:
    source, config = training.source, training.config
    weights = checkpoints.fp32_weights(folder / "checkpoints", summary.get("best_step", summary["steps"]), zero_stage(config))
    about = {
        "dump": source.dump.manifest["digest"],
        "target": source.dump.spec.target,
        "train": dataclasses.asdict(config),
        "summary": summary,
    }
    basis = (source.dump.target / BASIS).read() if source.dump.spec.compact else None
    draft = TrainedDraft(DraftHead(source.settings), source.vocabulary, source.aux_scale, about, basis)
    save_trained(folder, weights, draft, carried(source.dump.where))
