"""The test-time-training loss: sum over steps k of step_decay**k times a weighted mean over the rows alive at step k.

Denominators belong to the *global* batch of an optimiser step, so that the loss does not depend on ranks, accumulation or padding.
Legend: n_k rows alive at step k, n = their sum over the steps, b rows of a block, D draft vocabulary, m columns of the teacher.

Per row, q = softmax(logits), p the teacher over the draft vocabulary, true its mass over the whole one, alpha = sum_v min(true_v, q_v):

    soft cross-entropy   CE = -sum_v p_v log q_v
    lk-alpha             -log alpha                                                  (arXiv 2602.23881)
    lk-lambda            w CE + (1 - w) (1 - alpha), w = exp(-3 mean alpha of the optimiser step before), per step
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import DraftBatch
from .fused import wide
from .products import Linear, filled, laid_out, product, round_up, weight_gradient
from .teacher import TeacherRows

LEAST_ALPHA = 1e-6  # -log alpha has no gradient below it
BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**25}  # logits that exist at a time
PART_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}  # of these in fp32: on a CPU few enough for its caches


@dataclass(frozen=True)
class Objective:
    """What an optimiser step minimises."""

    loss: str  # train.loss
    normalisation: str  # train.normalisation
    step_decay: float
    denominator: Tensor  # [K], of the global batch
    mean_alpha: Tensor  # [K] mean acceptance in the optimiser step before; 0 before the first

    @property
    def needs_alpha(self) -> bool:
        return self.loss != "soft cross-entropy"


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


@dataclass
class RowTerms:
    """The rows of all steps, one step after the other, and the loss of a block of them. Sums up what is reported as it goes."""

    batch: DraftBatch
    teacher: TeacherRows
    objective: Objective

    def __post_init__(self) -> None:
        steps, device = self.batch.steps, self.teacher.inside.device
        counts = torch.tensor([len(step.rows) for step in steps])
        objective = self.objective
        pieces = [row_weights(self.batch, k, float(objective.denominator[k]), objective.normalisation) for k in range(len(steps))]
        decay = objective.step_decay ** torch.arange(len(steps))
        self.step = torch.arange(len(steps)).repeat_interleave(counts).to(device)  # [n]
        self.weight = torch.cat(pieces).to(device)  # [n] share in the global mean of the row's step
        self.decay = decay.repeat_interleave(counts).to(device)  # [n]
        self.share = torch.exp(-3.0 * objective.mean_alpha.float()).repeat_interleave(counts).to(device)  # [n] w of lk-lambda
        self.row = torch.cat([step.teacher for step in steps])  # [n] teacher row
        self.entropy = torch.zeros(len(steps), device=device)  # [K] each step's mean cross-entropy
        self.alpha = torch.zeros(len(steps), device=device)  # [K] each step's mean acceptance, where the loss needs it

    def __call__(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The part in the loss (a scalar) of rows start .. start + b, and its gradient [b, D]. logits [b, D], fp32 or wider.

        d CE / dz_v = q_v - p_v and d alpha / dz_v = q_v ([q_v < true_v] - s) with s = sum_u q_u [q_u < true_u].
        """
        rows = slice(start, start + len(logits))
        teacher, weight, step = self.row[rows], self.weight[rows].to(logits), self.step[rows]
        known = weight * self.teacher.argmax_known[teacher]  # an argmax outside the draft vocabulary: no loss, yet it counts
        of_loss = known * self.decay[rows]
        log_q, p = logits.log_softmax(-1), self.teacher.inside.index_select(0, teacher).to(logits.dtype)  # [b, D], [b, m]
        entropy = -(p * self.teacher.columns(log_q, teacher)).sum(-1)  # [b]
        self.entropy.index_add_(0, step, (known * entropy).to(self.entropy))
        q = log_q.exp_()
        if not self.objective.needs_alpha:
            return (of_loss * entropy).sum(), self.teacher.minus(q, teacher, p).mul_(of_loss[:, None])
        columns, true = self.teacher.columns(q, teacher), self.teacher.true[teacher].to(logits.dtype)
        alpha = torch.minimum(true, columns).sum(-1)  # [b]
        self.alpha.index_add_(0, step, (weight * alpha).to(self.alpha))
        if self.objective.loss == "lk-alpha":
            least = alpha.clamp(min=LEAST_ALPHA)
            losses, of_entropy, of_alpha = -least.log(), torch.zeros_like(alpha), -(alpha == least).to(alpha) / least
        else:
            share = self.share[rows].to(logits)
            losses, of_entropy, of_alpha = share * entropy + (1 - share) * (1 - alpha), share, share - 1
        below = columns * (columns < true)  # [b, m]
        of_q = of_entropy - of_alpha * below.sum(-1)  # [b]
        taken = of_entropy[:, None] * p - of_alpha[:, None] * below
        return (of_loss * losses).sum(), self.teacher.minus(q * of_q[:, None], teacher, taken).mul_(of_loss[:, None])


class _BlockedHead(torch.autograd.Function):
    """sum of terms(x @ weight.T) over blocks of rows, its gradients made on the way: one block of logits lives, in fp32 one part of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, terms: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Tensor:  # noqa: ANN001
        dtype = wide(x)
        total, dx = torch.zeros((), dtype=dtype, device=x.device), torch.empty_like(x)
        dw = None  # of the blocks so far
        sizes = BLOCK_ELEMENTS[x.device.type], PART_ELEMENTS[x.device.type]
        block_rows, part_rows = (round_up(max(1, elements // len(weight))) for elements in sizes)
        for start in range(0, len(x), block_rows):
            block = x[start : start + block_rows]
            inputs = filled(block)
            values = inputs @ weight.T  # logits, and part by part their gradient; 0 where rows were filled in
            for first in range(0, len(block), part_rows):
                part = values[first : min(first + part_rows, len(block))]
                loss, gradient = terms(part.to(dtype), start + first)
                total += loss
                part.copy_(gradient)
            dx[start : start + block_rows] = product(values, weight)[: len(block)]
            if dw is None or dtype == x.dtype:
                dw = weight_gradient(values, inputs, dw)
            else:
                dw = dw.to(dtype).add_(weight_gradient(values, inputs))  # small blocks' parts would be lost in a narrow sum
        ctx.save_for_backward(dx, torch.zeros_like(weight) if dw is None else laid_out(dw.to(weight.dtype)))
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN001
        dx, dw = ctx.saved_tensors
        return dx * scale.to(dx.dtype), dw * scale.to(dw.dtype), None


class VocabularyHead(Linear):
    """lm_head: logits, or with `terms` the loss of its rows in blocks (here, because ZeRO-3 gathers the weight for this call only)."""

    def forward(self, x: Tensor, terms: RowTerms | None = None) -> Tensor:
        return super().forward(x) if terms is None else _BlockedHead.apply(x, self.weight, terms)
