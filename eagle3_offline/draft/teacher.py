"""The target's distribution: softmax(transform(W h)) of stored last states (logits.py), or the top logits of a compact dump.

Legend: n rows, V target and D draft vocabulary, k logits kept of a compact teacher, m columns of a teacher: D or k.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..logits import HeadTransform
from ..machine import cpu_multiplies_bfloat16
from .batch import DraftBatch
from .products import exact_product, filled

BLOCK = 4096  # rows of W per block: neither [n, V] nor W in fp32 ever exists
CACHED_CONVERSATIONS = 50_000  # a few bytes a supervised token
BFLOAT16_ERROR = 2**-8  # relative bound of a rounded bfloat16 result
OUTSIDE = -1e30  # logit of a kept token that the draft cannot propose: no mass, yet finite


@dataclass(frozen=True)
class TeacherRows:
    """What the target thinks at each of a batch's teacher rows."""

    inside: Tensor  # [n, m] fp32, its shares over the draft's tokens (of a compact teacher: the kept ones), summing to 1; 0 without any
    ids: Tensor | None  # [n, k] draft id of each column, of a compact teacher; None: column i is draft id i
    argmax_known: Tensor  # [n] bool: the whole vocabulary's argmax is in the draft vocabulary
    true: Tensor | None  # [n, m] fp32, its true mass on each column's token, where it was asked for

    def columns(self, draft: Tensor, rows: Tensor) -> Tensor:
        """[n_k, m] of a draft's values [n_k, D]: those of this teacher's columns, at the teacher rows `rows` [n_k]."""
        return draft if self.ids is None else draft.gather(1, self.ids[rows])

    def minus(self, draft: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """The draft's values [n_k, D], in place, less `values` [n_k, m] in these columns."""
        return draft.sub_(values) if self.ids is None else draft.scatter_add_(1, self.ids[rows], -values)


class Teacher(Protocol):
    """Gives the teacher rows of a batch."""

    def __call__(self, batch: DraftBatch, whole: bool = False) -> TeacherRows:
        """`whole`: with the true masses, which need the log-sum-exp over the whole vocabulary."""


def teacher_of(lm_head: Tensor, target_ids: Tensor, top_k: int | None, transform: HeadTransform) -> Teacher:
    """The teacher for a dump: a compact one keeps top_k logits, a full one (None) last states. lm_head [V, H]; target_ids [D] int64."""
    return FullTeacher(lm_head, target_ids, transform) if top_k is None else CompactTeacher(len(lm_head), target_ids.to(lm_head.device))


def teacher_name(top_k: int | None) -> str:
    """What a report says of its teacher."""
    return "last states" if top_k is None else f"top {top_k} logits: alpha is a lower bound, kl is over the kept tokens"


class CompactTeacher:
    """Kept logits inside the draft vocabulary. True masses are exact for them and unknown for the rest: alpha is a lower bound."""

    def __init__(self, vocab_size: int, target_ids: Tensor):
        self.draft_ids = torch.full((vocab_size,), -1, dtype=torch.int64, device=target_ids.device)  # [V]
        self.draft_ids[target_ids] = torch.arange(len(target_ids), device=target_ids.device)

    def __call__(self, batch: DraftBatch, whole: bool = False) -> TeacherRows:
        ids = self.draft_ids[batch.top.ids]  # [n, k]
        inside = ids >= 0
        logits = torch.where(inside, batch.top.log_probs, OUTSIDE)
        shares = logits.softmax(-1) * inside.any(-1, keepdim=True)
        return TeacherRows(shares, ids.clamp(min=0), inside[:, 0], logits.exp() if whole else None)


class FullTeacher:
    """The target's head and its slice over the draft vocabulary. What concerns the whole vocabulary is kept for later epochs."""

    def __init__(self, lm_head: Tensor, target_ids: Tensor, transform: HeadTransform | None = None):
        """lm_head [V, H]; target_ids [D] int64; transform: what the target does to W h, None: nothing."""
        self.target_ids, self.transform = target_ids, (transform or HeadTransform()).to(lm_head.device)
        self.weight = lm_head
        self.sliced = lm_head[target_ids].float()
        self.known = torch.zeros(len(lm_head), dtype=torch.bool, device=lm_head.device)
        self.known[target_ids] = True
        self.hides_known = torch.zeros_like(self.known, dtype=lm_head.dtype).masked_fill_(self.known, -torch.inf)  # [V] added to logits
        self.quick = _quick(lm_head) and self.transform.bias is None
        self._known_of: OrderedDict[str, Tensor] = OrderedDict()
        self._normaliser_of: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, batch: DraftBatch, whole: bool = False) -> TeacherRows:
        narrow = self.weight.dtype == batch.last.dtype == torch.bfloat16
        products = exact_product(batch.last, self.sliced) if narrow else batch.last.float() @ self.sliced.T  # [n, D]
        known = _kept(self._known_of, batch, lambda: self.argmax_known(batch.last, products))
        logits, true = self.transform(products, self.target_ids), None
        if whole:
            true = (logits - _kept(self._normaliser_of, batch, lambda: self.log_normaliser(batch.last))[:, None]).exp()
        return TeacherRows(logits.softmax(-1), None, known, true)

    def argmax_known(self, last: Tensor, products: Tensor) -> Tensor:
        """[n] bool: whether the whole vocabulary's argmax is a draft token. products [n, D]: W h of the draft's tokens.

        Without a bias they rank as the logits do. The other tokens' are made in bfloat16, a third of the time: products of bfloat16 states
        are exact, so that only the result is rounded; where two maxima are too near, tokens that may be the largest are done again.
        Of two that are equal the one outside counts.
        """
        if not self.quick or last.dtype != torch.bfloat16:
            return self.known[argmax(last, self.weight, self.transform)]
        if self.known.all():
            return torch.ones(len(last), dtype=torch.bool, device=last.device)
        inside = products.amax(-1)
        others = (z.add_(self.hides_known[tokens]) for tokens, z in _blocks(last, self.weight, torch.bfloat16))
        outside = torch.stack([z.amax(-1) for z in others]).amax(0).float()
        known = inside > outside
        error = BFLOAT16_ERROR * torch.maximum(inside.abs(), outside.abs()) + 1e-3
        near = (inside - outside).abs() <= error
        if near.any():
            least = outside - 2 * error  # the largest may have been rounded down, and outside's up
            known[near] = inside[near] > self._largest_outside(last[near], least[near])
        return known

    def _largest_outside(self, last: Tensor, least: Tensor) -> Tensor:
        """[n] fp32: the largest W h of the tokens outside the draft vocabulary, which in bfloat16 is `least` [n] or more."""
        largest = torch.full((len(last),), float("-inf"), device=last.device)
        for tokens, z in _blocks(last, self.weight, torch.bfloat16):
            some = (z >= least[:, None]).any(0) & ~self.known[tokens]
            if some.any():
                largest = torch.maximum(largest, (last.float() @ self.weight[tokens][some].float().T).max(-1).values)
        return largest

    def log_normaliser(self, last: Tensor) -> Tensor:
        """Log-sum-exp [n] over the whole vocabulary: exp(z - it) is the target's true mass on a token."""
        total = torch.full((len(last),), float("-inf"), device=last.device)
        for tokens, z in _blocks(last, self.weight):
            total = torch.logaddexp(total, self.transform(z, tokens).logsumexp(-1))
        return total


def _quick(lm_head: Tensor) -> bool:
    """Whether bfloat16 products are faster here."""
    return lm_head.dtype == torch.bfloat16 and (lm_head.is_cuda or cpu_multiplies_bfloat16())


def _kept(cache: OrderedDict[str, Tensor], batch: DraftBatch, make: Callable[[], Tensor]) -> Tensor:
    """[n] the cached values of a batch's conversations, all made anew where one is missing."""
    if not all(name in cache for name in batch.ids):
        cache.update((name, value.clone()) for name, value in zip(batch.ids, make().split(batch.teacher_counts), strict=True))
    values = torch.cat([cache[name] for name in batch.ids])
    while len(cache) > CACHED_CONVERSATIONS:
        cache.popitem(last=False)
    return values


def argmax(last: Tensor, weight: Tensor, transform: HeadTransform | None = None) -> Tensor:
    """[n] int64: argmax of the logits of last [n, H] @ weight.T [H, V], streamed over blocks of the vocabulary."""
    transform = transform or HeadTransform()
    best = torch.full((len(last),), float("-inf"), device=last.device)
    winner = torch.zeros(len(last), dtype=torch.int64, device=last.device)
    for tokens, z in _blocks(last, weight):
        value, index = transform.ranked(z, tokens).max(-1)
        better = value > best
        best, winner = torch.where(better, value, best), torch.where(better, index + tokens.start, winner)
    return winner


def _blocks(last: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, products [n, block] made in `dtype`) over the vocabulary."""
    rows = filled(last.to(dtype))
    for start in range(0, len(weight), BLOCK):
        tokens = slice(start, min(start + BLOCK, len(weight)))
        yield tokens, (rows @ weight[tokens].to(dtype).T)[: len(last)]
