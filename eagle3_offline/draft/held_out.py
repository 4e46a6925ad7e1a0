"""Measure a draft on held-out samples: unroll it to the serving chain's length and count hits. Legend as draft/batch.py."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..records import Sample, turn_of_token
from .batch import DraftBatch, collate
from .measures import HeldOut
from .model import DraftHead
from .teacher import Teacher, TeacherRows
from .unroll import unroll


@torch.no_grad()
def measure(
    head: DraftHead,
    samples: Iterable[Sample],
    *,
    embed: Tensor,
    target_ids: Tensor,
    chain: int,
    aux_scale: Tensor | None = None,
    teacher: Teacher | None = None,
) -> HeldOut:
    """Walk, acceptance and (with a teacher) alpha and KL of a draft.

    embed [V, H]; target_ids [D] int64; chain: drafted tokens per verification. A hit is the draft's argmax, mapped to the
    target's ids, that equals the stored next token; tokens outside the draft vocabulary are misses.
    """
    totals = HeldOut.empty(chain)
    target_ids = target_ids.to(embed.device)
    for sample in samples:
        batch = collate([sample], chain, aux_scale).to(embed.device)
        logits = [step.float() for step in unroll(head, batch, embed, chain)]
        hits = np.zeros((len(sample.input_ids), chain), bool)
        for k, step in enumerate(batch.steps):
            hits[step.rows.cpu().numpy(), k] = (target_ids[logits[k].argmax(-1)] == step.predicted).cpu().numpy()
        totals.add_hits(sample.turns, turn_of_token(sample.turns, len(sample.input_ids)), hits)
        if teacher is not None:
            _add_distances(totals, logits, batch, teacher(batch, whole=True))
    return totals


def _add_distances(totals: HeldOut, logits: list[Tensor], batch: DraftBatch, teacher: TeacherRows) -> None:
    inside, true = teacher.inside, teacher.true  # [n, m]
    for k, step in enumerate(batch.steps):
        log_q = teacher.columns(logits[k].log_softmax(-1), step.teacher)  # [n_k, m]
        p = inside[step.teacher]
        totals.acceptance[k] += float(torch.minimum(true[step.teacher], log_q.exp()).sum())
        totals.divergence[k] += float((torch.xlogy(p, p) - p * log_q).sum())
