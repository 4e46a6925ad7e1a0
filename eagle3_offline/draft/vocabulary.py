"""The draft vocabulary: the tokens that a draft can propose (eagle3: d2t holds offsets, t2d membership)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DraftVocabulary:
    """Target ids of the draft's tokens, ascending: draft id i is target id `target_ids[i]`."""

    target_ids: np.ndarray  # [D] int64
    coverage: float  # share of the train answers' tokens that the draft can propose

    @property
    def d2t(self) -> np.ndarray:
        """[D] int64 offsets: target id = draft id + d2t[draft id]."""
        return self.target_ids - np.arange(len(self.target_ids))

    def t2d(self, vocab_size: int) -> np.ndarray:
        """[V] bool: whether the draft can propose a target token."""
        member = np.zeros(vocab_size, bool)
        member[self.target_ids] = True
        return member

    def draft_ids(self, vocab_size: int) -> np.ndarray:
        """[V] int64: draft id of a target token, -1 outside the draft vocabulary."""
        ids = np.full(vocab_size, -1, np.int64)
        ids[self.target_ids] = np.arange(len(self.target_ids))
        return ids


def draft_vocabulary(counts: np.ndarray, size: int, always: list[int]) -> DraftVocabulary:
    """The `size` most frequent tokens, the ids in `always` (those that end a turn) among them.

    counts [V]: occurrences in the train answers. Ties and unused places go to the lowest ids.
    """
    size = min(size, len(counts))
    ranked = counts.astype(np.int64).copy()
    ranked[always] = np.iinfo(np.int64).max
    chosen = np.sort(np.argsort(-ranked, kind="stable")[:size])
    total = counts.sum()
    return DraftVocabulary(chosen, float(counts[chosen].sum() / total) if total else 0.0)
