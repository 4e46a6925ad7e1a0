"""One optimiser step over the global batch, and what it carries to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..draft.batch import DraftBatch
from ..draft.loss import Objective, RowTerms, denominators
from ..draft.teacher import Teacher
from .data import Source
from .distributed import Ranks, all_list, all_sum
from .order import last_step


@dataclass
class Carried:
    """What a step leaves to the next, beside the engine's own state; saved with every checkpoint."""

    mean_alpha: Tensor  # [K] mean acceptance per unroll step, of the LK losses
    taus: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out tau) of the evaluations so far
    seconds: float = 0.0  # of training, over all resumes
    skipped_in_a_row: int = 0

    @property
    def best(self) -> int | None:
        """Step of the best held-out tau, the first of equals."""
        return max(self.taus, key=lambda item: item[1])[0] if self.taus else None

    def stalled(self, patience: int) -> bool:
        """Whether so many evaluations in a row (0: never) were no better than the best before them."""
        return bool(patience) and sum(step > self.best for step, _ in self.taus) >= patience

    def state(self) -> dict[str, Any]:
        return {"mean_alpha": self.mean_alpha.tolist(), "taus": self.taus, "seconds": self.seconds}

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self.mean_alpha = torch.tensor(state["mean_alpha"], dtype=self.mean_alpha.dtype)
            self.taus, self.seconds = [tuple(item) for item in state["taus"]], state["seconds"]


@dataclass(frozen=True)
class Training:
    """All that one step needs."""

    config: TrainConfig
    source: Source
    engine: Any  # deepspeed.DeepSpeedEngine
    teacher: Teacher
    ranks: Ranks
    carried: Carried

    @property
    def steps(self) -> int:
        """The number of its last step, unless it stops early."""
        return last_step(self.config.total_steps, self.config.epochs, self.config.batch_size, len(self.source.train_rows))


def one_step(training: Training, micro: list[DraftBatch]) -> tuple[dict[str, float], dict[str, Any] | None]:
    """One optimiser step. Returns its measures, and where it was skipped (loss or gradient not finite) the reason and the rows.

    The measures: loss, each unroll step's cross-entropy (and acceptance, of the LK losses), learning rate, gradient norm.
    """
    config, engine, ranks, carried = training.config, training.engine, training.ranks, training.carried
    denominator = all_sum(denominators(micro, config.normalisation), ranks)
    objective = Objective(config.loss, config.normalisation, config.step_decay, denominator, carried.mean_alpha)
    learning_rate, skipped_before = engine.get_lr()[0], engine.skipped_steps  # of this step; step() sets the next one's
    parts = torch.zeros(1 + 2 * config.ttt_length, dtype=torch.float64)
    bad: list[str] = []
    for number, batch in enumerate(batch.to(ranks.device) for batch in micro):
        engine.set_gradient_accumulation_boundary(number == len(micro) - 1)
        # the teacher's rows are named nowhere here, so that they are gone before the backward pass
        loss, entropies, alphas = engine(
            batch, training.source.embed, RowTerms(batch, training.teacher(batch, objective.needs_alpha), objective)
        )
        if not torch.isfinite(loss):
            bad += batch.ids  # its gradient is not finite either, so that DeepSpeed skips the step, on all ranks
        engine.backward(loss * ranks.world)  # DeepSpeed averages over ranks; this loss is a sum
        _drop_bad_gradients(engine)
        engine.step()
        parts += torch.cat((loss.detach()[None], entropies, alphas)).double().cpu()
    loss_value, *means = all_sum(parts, ranks).tolist()
    entropies, alphas = means[: config.ttt_length], means[config.ttt_length :]
    values = {"loss": loss_value, **{f"ce_{k}": value for k, value in enumerate(entropies)}}
    if objective.needs_alpha:
        values |= {f"alpha_{k}": value for k, value in enumerate(alphas)}
    norm = engine.get_global_grad_norm()  # None without ZeRO
    values |= {"learning_rate": learning_rate, "gradient_norm": math.nan if norm is None else float(norm)}
    if engine.skipped_steps > skipped_before:
        carried.skipped_in_a_row += 1
        return values, _skipped(micro, bad, ranks)
    carried.skipped_in_a_row = 0
    carried.mean_alpha = torch.tensor(alphas, dtype=carried.mean_alpha.dtype)
    return values, None


def _drop_bad_gradients(engine: Any) -> None:
    """Without ZeRO DeepSpeed looks at no gradient: here, before the step that would apply it. Every rank sees the same sums."""
    if engine.zero_optimization() or not engine.is_gradient_accumulation_boundary():
        return
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        engine.skipped_steps += 1
        for parameter in engine.module.parameters():
            parameter.grad = None


def _skipped(micro: list[DraftBatch], bad: list[str], ranks: Ranks) -> dict[str, Any]:
    """Why a step was skipped and its rows, over all ranks: those of the losses that are not finite, else all of the step's."""
    bad = all_list(bad, ranks)
    if bad:
        return {"reason": "the loss is not finite", "rows": sorted(bad)}
    rows = all_list([name for batch in micro for name in batch.ids], ranks)
    return {"reason": "the gradient is not finite", "rows": sorted(rows)}
