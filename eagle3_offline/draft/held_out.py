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
            _add_distances(totals, logits, batch, teacher(batch), teacher.log_normaliser(batch.last))
    return totals


def _add_distances(totals: HeldOut, logits: list[Tensor], batch: DraftBatch, teacher: TeacherRows, log_normaliser: Tensor) -> None:
    for k, step in enumerate(batch.steps):
        z = teacher.logits[step.teacher]  # [n_k, D]
        true = (z - log_normaliser[step.teacher, None]).exp()  # the target's mass on each draft token
        log_q = logits[k].log_softmax(-1)
        log_p = z.log_softmax(-1)
        totals.acceptance[k] += float(torch.minimum(true, log_q.exp()).sum())
        totals.divergence[k] += float((log_p.exp() * (log_p - log_q)).sum())
