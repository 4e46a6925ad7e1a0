"""The target's distribution at stored last states: softmax(W h). Legend: n rows, V target and D draft vocabulary."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import DraftBatch

BLOCK = 16384  # rows of W per block: [n, V] in fp32 never exists
CACHED_CONVERSATIONS = 50_000  # 8 bytes a supervised token


@dataclass(frozen=True)
class TeacherRows:
    """What the target thinks at each row of DraftBatch.last."""

    logits: Tensor  # [n, D] fp32, z over the draft vocabulary
    log_normaliser: Tensor  # [n] fp32, logsumexp of z over the whole vocabulary
    argmax_known: Tensor  # [n] bool: the whole vocabulary's argmax is in the draft vocabulary


class Teacher:
    """The target's head, sliced to the draft vocabulary. The full-vocabulary numbers of a conversation are kept for later epochs."""

    def __init__(self, lm_head: Tensor, target_ids: Tensor):
        """lm_head [V, H]; target_ids [D] int64."""
        self.weight = lm_head.float()
        self.sliced = self.weight[target_ids]
        self.known = torch.zeros(len(lm_head), dtype=torch.bool, device=lm_head.device)
        self.known[target_ids] = True
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, batch: DraftBatch) -> TeacherRows:
        pieces = [self._full(name, last) for name, last in zip(batch.ids, batch.last.split(batch.last_counts), strict=True)]
        log_normaliser, argmax = (torch.cat(column) for column in zip(*pieces, strict=True))
        return TeacherRows(batch.last.float() @ self.sliced.T, log_normaliser, self.known[argmax])

    def _full(self, name: str, last: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self._cache:
            self._cache[name] = full_vocabulary(last.float(), self.weight)
            if len(self._cache) > CACHED_CONVERSATIONS:
                self._cache.popitem(last=False)
        return self._cache[name]


def full_vocabulary(last: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [n] and argmax [n] of last @ weight.T over the whole vocabulary, streamed over blocks of it."""
    normaliser = torch.full((len(last),), float("-inf"), device=last.device)
    best, argmax = normaliser.clone(), torch.zeros(len(last), dtype=torch.int64, device=last.device)
    for start in range(0, len(weight), BLOCK):
        z = last @ weight[start : start + BLOCK].T  # [n, block]
        normaliser = torch.logaddexp(normaliser, z.logsumexp(-1))
        value, index = z.max(-1)
        better = value > best
        best, argmax = torch.where(better, value, best), torch.where(better, index + start, argmax)
    return normaliser, argmax
