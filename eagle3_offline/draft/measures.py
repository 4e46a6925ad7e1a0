"""Accept length from held-out rows, without a server. Pure numpy. Legend: T tokens of a conversation, K unroll steps.

tau = (generated tokens - requests) / verification steps, over all requests together. A step's product is its accepted
drafts plus the bonus token, cut at the end of the answer; a request's first token comes from the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .shift import first_root, serving_rows

DRAWS = 10_000  # of the bootstrap


@dataclass
class WalkCount:
    """Products and steps of walked answers, summed over all requests."""

    products: int = 0
    steps: int = 0

    @property
    def tau(self) -> float | None:
        return ratio(self.products, self.steps)

    def __iadd__(self, other: WalkCount) -> WalkCount:
        self.products += other.products
        self.steps += other.steps
        return self


def total(walks: Iterable[WalkCount]) -> WalkCount:
    """The walks of many conversations as one."""
    count = WalkCount()
    for walk in walks:
        count += walk
    return count


def paired_difference(ours: Sequence[list[WalkCount]], base: Sequence[list[WalkCount]]) -> list[float] | None:
    """Mean over pairs of drafts of tau(ours) - tau(base), and the bounds of its 95 % interval by bootstrap.

    ours, base: of each draft the walks of the same conversations, which are drawn again for all of them alike. None of fewer than two
    conversations that have steps.
    """
    stepped = [n for n, walk in enumerate(base[0]) if walk.steps]  # the others have none in any walk
    if len(stepped) < 2:
        return None
    pairs = [[np.array([(w.products, w.steps) for w in walks])[stepped] for walks in pair] for pair in zip(ours, base, strict=True)]

    def difference(rows: np.ndarray) -> float:
        taus = [[np.divide(*walks[rows].sum(0)) for walks in pair] for pair in pairs]
        return float(np.mean([mine - other for mine, other in taus]))

    rng = np.random.default_rng(0)
    drawn = [difference(rng.integers(len(stepped), size=len(stepped))) for _ in range(DRAWS)]
    return [difference(np.arange(len(stepped))), *np.quantile(drawn, (0.025, 0.975)).tolist()]


def walk_answer(start: int, end: int, accepted: Callable[[int, int], int]) -> WalkCount:
    """Walk the answer of tokens [start, end) as greedy speculative decoding would.

    `accepted(root, most)` is the number of drafted tokens (at most `most`) that equal the answer after the token `root`.
    The first root is the answer's first token; a step at root r yields its hits and one bonus token, cut to the answer.
    """
    count, root = WalkCount(), start
    while (remaining := end - 1 - root) > 0:  # no step starts at the answer's last token
        product = min(accepted(root, remaining) + 1, remaining)
        count.products += product
        count.steps += 1
        root += product
    return count


def consecutive_hits(hits: np.ndarray) -> np.ndarray:
    """[T] number of leading hits of each row's chain. hits [T, K] bool, False where a row is not alive."""
    return np.logical_and.accumulate(hits, axis=1).sum(axis=1)


def walk_hits(turns: tuple[tuple[int, int], ...], hits: np.ndarray) -> WalkCount:
    """The walk of every answer of a conversation from its rows' hits [T, K]: row p is the root at token p + 1."""
    chain = consecutive_hits(hits)
    count = WalkCount()
    for start, end in turns:
        count += walk_answer(start, end, lambda root, most: min(int(chain[root - 1]), most))
    return count


@dataclass
class HeldOut:
    """Sums over held-out rows, from which every in-loop measure comes."""

    steps: int
    walks: list[WalkCount]  # of each conversation
    turns: int = 0
    first_hits: int = 0  # turns whose first draft at their first root row hit
    first_roots: int = 0  # turns that have such a row
    rows: int = 0  # all root rows
    chain_hits: int = 0  # sum of their consecutive hits
    reached: np.ndarray | None = None  # [K] rows alive at step k whose chain held before it
    hit: np.ndarray | None = None  # [K] those that hit at step k
    alive: np.ndarray | None = None  # [K] rows alive at step k
    acceptance: np.ndarray | None = None  # [K] sum of alpha = sum_v min(p, q), over the columns of the teacher
    divergence: np.ndarray | None = None  # [K] sum of KL(p || q) over the draft vocabulary

    @classmethod
    def empty(cls, steps: int) -> HeldOut:
        zeros = [np.zeros(steps) for _ in range(5)]
        return cls(steps, [], 0, 0, 0, 0, 0, *zeros)

    @property
    def walk(self) -> WalkCount:
        """Of all conversations together."""
        return total(self.walks)

    def add_hits(self, turns: tuple[tuple[int, int], ...], turn: np.ndarray, hits: np.ndarray) -> None:
        """Count one conversation's hits [T, K]; turn [T] is records.turn_of_token."""
        self.walks.append(walk_hits(turns, hits))
        self.turns += len(turns)
        holding = np.ones(len(hits), bool)
        for k in range(self.steps):
            rows = serving_rows(turn, k)
            self.alive[k] += len(rows)
            self.reached[k] += holding[rows].sum()
            self.hit[k] += (holding[rows] & hits[rows, k]).sum()
            holding &= hits[:, k]
        roots = serving_rows(turn, 0)
        self.rows += len(roots)
        self.chain_hits += int(consecutive_hits(hits)[roots].sum())
        first = [first_root(start) for start, end in turns if end - start > 1]
        self.first_roots += len(first)
        self.first_hits += int(hits[first, 0].sum())

    def summary(self) -> dict[str, object]:
        """Plain JSON values. `tau` is the walk's; `tau_all_rows` averages over all root rows and is biased upwards."""
        walk = self.walk
        return {
            "tau": walk.tau,
            "tau_all_rows": ratio(self.rows + self.chain_hits, self.rows),
            "first_root_hit": ratio(self.first_hits, self.first_roots),
            "conditional_acceptance": [ratio(*pair) for pair in zip(self.hit, self.reached, strict=True)],
            "alpha": [ratio(*pair) for pair in zip(self.acceptance, self.alive, strict=True)],
            "kl": [ratio(*pair) for pair in zip(self.divergence, self.alive, strict=True)],
            "answers": self.turns,
            "verification_steps": walk.steps,
            "answer_tokens": walk.products + self.turns,
        }


def ratio(part: float, whole: float) -> float | None:
    """part / whole as plain JSON: None where there is nothing to divide by."""
    return float(part / whole) if whole else None
