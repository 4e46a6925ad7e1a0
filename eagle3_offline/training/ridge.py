"""A start for fc: the best linear guess, one token ahead, of the state that lm_head reads.

Ridge regression of features x[p] (what fc reads, scaled or normed) onto last[p+1] / norm.weight over rows p with m[p+1] = 1, so that
lm_head(norm(fc(x))) starts near the best linear guess. Legend: A width of what fc reads, H hidden size, n rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..draft.batch import to_torch
from ..draft.model import DraftHead
from ..records import Sample, turn_of_token
from .data import Source

RIDGE = 1e-3  # added to the diagonal, in units of the mean diagonal
ROWS_PER_CHANNEL = 40  # rows of the regression for each of the A channels, where there are so many


def start_fc(source: Source, head: DraftHead) -> None:
    """Put the regression's weights into head.fc; of a compact dump, those that were fitted with its basis."""
    if source.dump.spec.compact:
        weight = torch.from_numpy(source.dump.basis()["ridge"].copy())
    else:
        weight = regress(pairs(source, head, ROWS_PER_CHANNEL * source.settings.aux_width), source.settings.aux_width)
    with torch.no_grad():
        head.fc.weight.copy_(weight)


def regress(given: Iterable[tuple[Tensor, Tensor]], width: int) -> Tensor:
    """[H, A] fp32 from pairs of features [n, A] and what they shall give [n, H]. fp32 products, fp64 sums."""
    gram = torch.zeros(width, width, dtype=torch.float64)
    crossed = None
    for x, y in given:
        gram += (x.T @ x).double()
        crossed = (x.T @ y).double() + (0 if crossed is None else crossed)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, crossed).T.float()


@torch.no_grad()
def pairs(source: Source, head: DraftHead, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets of train rows, sample by sample in a seeded order, until there are `rows` of them."""
    norm = source.norm.float().cpu()
    for i in np.random.default_rng(0).permutation(source.train_rows):
        if rows <= 0:
            return
        x, y = pair(source.sample(int(i)), source, head, norm)
        rows -= len(x)
        yield x, y


def pair(sample: Sample, source: Source, head: DraftHead, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, A] of the rows p with m[p+1] = 1, and last[p+1] / norm.weight [n, H]."""
    turn = turn_of_token(sample.turns, len(sample.input_ids))
    p = np.flatnonzero(turn[1:])
    x = to_torch(sample.aux)[p].float()
    if source.aux_scale is not None:
        x = x * source.aux_scale
    ahead = to_torch(sample.last)[np.searchsorted(sample.last_positions, p + 1)].float()
    return head.normed(x), ahead / norm
