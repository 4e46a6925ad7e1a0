"""The test-time-training loss: sum over steps k of step_decay**k times a weighted mean of soft cross-entropies.

Denominators belong to the *global* batch of an optimiser step, so that the loss does not depend on ranks, accumulation
or padding. Legend: n_k rows alive at step k, B conversations, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import DraftBatch
from .teacher import TeacherRows


def soft_cross_entropy(logits: Tensor, columns: Tensor, teacher: Tensor) -> Tensor:
    """-sum_v teacher_v log softmax(logits)_v per row: [n]. logits [n, D]; columns [n, m], those of the teacher's tokens; teacher [n, m]."""
    return logits.logsumexp(-1) - (teacher * columns).sum(-1)


def denominators(batches: list[DraftBatch], normalisation: str) -> Tensor:
    """Per step what the sums are divided by: alive rows (`token`) or conversations with any (`sequence`). [K], to be summed over ranks."""
    steps = range(len(batches[0].steps))
    if normalisation == "token":
        totals = [sum(sum(batch.steps[k].counts) for batch in batches) for k in steps]
    else:
        totals = [sum(sum(count > 0 for count in batch.steps[k].counts) for batch in batches) for k in steps]
    return torch.tensor(totals, dtype=torch.float64)


def row_weights(batch: DraftBatch, step: int, denominator: float, normalisation: str) -> Tensor:
    """Weight of each row of a step in the global mean: [n_k]."""
    counts = torch.tensor(batch.steps[step].counts)
    per_conversation = torch.ones(len(counts)) if normalisation == "token" else 1.0 / counts.clamp(min=1)
    return per_conversation.repeat_interleave(counts) / max(denominator, 1.0)


def ttt_loss(
    logits: list[Tensor], batch: DraftBatch, teacher: TeacherRows, denominator: Tensor, normalisation: str, step_decay: float
) -> tuple[Tensor, Tensor]:
    """The batch's share of the global loss (a scalar) and of each step's mean cross-entropy ([K], detached).

    A row whose full-vocabulary argmax is outside the draft vocabulary carries no loss at that step, yet counts in the
    denominator. Raises nothing: a batch without a live row has loss 0 (connected to the graph, for gradient hooks).
    """
    total = logits[0].sum() * 0.0
    inside = teacher.inside  # [n, m], shared by the steps
    per_step = []
    for k, step_logits in enumerate(logits):
        step = batch.steps[k]
        wide = step_logits if step_logits.dtype == torch.float64 else step_logits.float()
        entropy = soft_cross_entropy(wide, teacher.columns(wide, step.teacher), inside[step.teacher].to(wide.dtype))
        weights = row_weights(batch, k, float(denominator[k]), normalisation).to(entropy)
        mean = (entropy * weights * teacher.argmax_known[step.teacher]).sum()
        total = total + step_decay**k * mean
        per_step.append(mean.detach())
    return total, torch.stack(per_step)
