"""The target's distribution at stored last states: softmax(W h). Legend: n rows, V target and D draft vocabulary."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import DraftBatch

BLOCK = 16384  # rows of W per block: [n, V] in fp32 never exists
CACHED_CONVERSATIONS = 50_000  # one byte a supervised token


@dataclass(frozen=True)
class TeacherRows:
    """What the target thinks at each row of DraftBatch.last."""

    logits: Tensor  # [n, D] fp32, z over the draft vocabulary
    argmax_known: Tensor  # [n] bool: the whole vocabulary's argmax is in the draft vocabulary


class Teacher:
    """The target's head and its slice over the draft vocabulary. Whole-vocabulary argmaxes are kept for later epochs."""

    def __init__(self, lm_head: Tensor, target_ids: Tensor):
        """lm_head [V, H]; target_ids [D] int64."""
        self.weight = lm_head.float()
        self.sliced = self.weight[target_ids]
        self.known = torch.zeros(len(lm_head), dtype=torch.bool, device=lm_head.device)
        self.known[target_ids] = True
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, batch: DraftBatch) -> TeacherRows:
        pieces = zip(batch.ids, batch.last.split(batch.last_counts), strict=True)
        known = torch.cat([self._argmax_known(name, last) for name, last in pieces])
        return TeacherRows(batch.last.float() @ self.sliced.T, known)

    def log_normaliser(self, last: Tensor) -> Tensor:
        """Log-sum-exp [n] over the whole vocabulary: exp(z - it) is the target's true mass on a token."""
        total = torch.full((len(last),), float("-inf"), device=last.device)
        for _, z in _blocks(last, self.weight):
            total = torch.logaddexp(total, z.logsumexp(-1))
        return total

    def _argmax_known(self, name: str, last: Tensor) -> Tensor:
        """[n] bool of one conversation."""
        if name not in self._cache:
            self._cache[name] = self.known[argmax(last, self.weight)]
            if len(self._cache) > CACHED_CONVERSATIONS:
                self._cache.popitem(last=False)
        return self._cache[name]


def argmax(last: Tensor, weight: Tensor) -> Tensor:
    """[n] int64: argmax of last [n, H] @ weight.T [H, V], streamed over blocks of the vocabulary."""
    best = torch.full((len(last),), float("-inf"), device=last.device)
    winner = torch.zeros(len(last), dtype=torch.int64, device=last.device)
    for start, z in _blocks(last, weight):
        value, index = z.max(-1)
        better = value > best
        best, winner = torch.where(better, value, best), torch.where(better, index + start, winner)
    return winner


def _blocks(last: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first token, logits [n, block] in the weight's dtype) over the vocabulary."""
    last = last.to(weight.dtype)
    for start in range(0, len(weight), BLOCK):
        yield start, last @ weight[start : start + BLOCK].T
