"""The n-gram lookup drafter: the baseline that a draft worth serving beats."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..draft.measures import WalkCount, walk_answer

INDEXED_TOKENS = 1_000_000  # answers beyond this many tokens are left out of the index


class NgramLookup:
    """Proposes what followed the longest known suffix of the context: at each length the own context first, then the train answers."""

    def __init__(self, answers: Iterable[np.ndarray], longest: int):
        """answers: token ids of the train answers; longest: tokens of the longest suffix."""
        self.longest = longest
        self._answers: list[list[int]] = []
        self._index: dict[tuple[int, ...], tuple[int, int]] = {}  # n-gram -> answer, place behind it
        total = 0
        for answer in answers:
            if total >= INDEXED_TOKENS:
                break
            total += len(answer)
            self._answers.append(answer.tolist())
            _index(self._index, self._answers[-1][:-1], longest, len(self._answers) - 1, 0)  # nothing follows an answer's end

    def walk(self, input_ids: np.ndarray, turns: tuple[tuple[int, int], ...], chain: int) -> WalkCount:
        """Walk a conversation's answers with chains of the lookup's proposals."""
        ids = input_ids.tolist()
        count = WalkCount()
        for start, end in turns:
            own: dict[tuple[int, ...], tuple[int, int]] = {}
            indexed = 0

            def accepted(root: int, most: int, own: dict = own) -> int:
                nonlocal indexed
                _index(own, ids[:root], self.longest, -1, indexed)  # n-grams that end before the root: something follows them
                indexed = root
                proposal = self._propose(ids[: root + 1], own)[: min(chain, most)]
                return common_prefix(proposal, ids[root + 1 :])

            count += walk_answer(start, end, accepted)
        return count

    def _propose(self, context: list[int], own: dict[tuple[int, ...], tuple[int, int]]) -> list[int]:
        for length in range(min(self.longest, len(context)), 0, -1):
            suffix = tuple(context[-length:])
            if suffix in own:
                return context[own[suffix][1] :]
            if suffix in self._index:
                answer, place = self._index[suffix]
                return self._answers[answer][place:]
        return []


def _index(index: dict[tuple[int, ...], tuple[int, int]], ids: list[int], longest: int, answer: int, first: int) -> None:
    """Note where each n-gram that ends in ids[first:] ends; later places replace earlier ones."""
    for end in range(first + 1, len(ids) + 1):
        for length in range(1, min(longest, end) + 1):
            index[tuple(ids[end - length : end])] = (answer, end)


def common_prefix(proposal: list[int], truth: list[int]) -> int:
    """Length of the common beginning."""
    for n, (a, b) in enumerate(zip(proposal, truth, strict=False)):
        if a != b:
            return n
    return min(len(proposal), len(truth))
