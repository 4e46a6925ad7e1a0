"""Which rows an optimiser step sees: a function of (seed, epoch, number of rows) alone, whatever the ranks.

The rows of all epochs stand in one line, each epoch shuffled by its own seed; step s takes the next batch of the line, and
rank r of w takes every w-th row of it, from the r-th on. Nothing is dropped: a batch may reach into the next epoch.
"""

from __future__ import annotations

import numpy as np


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of range(rows)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def epochs_done(steps: int, batch_size: int, rows: int) -> int:
    """Whole epochs behind so many steps."""
    return steps * batch_size // rows


def step_rows(seed: int, step: int, batch_size: int, rows: int) -> np.ndarray:
    """Row numbers of a step's global batch: [batch_size]."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // rows
    return np.concatenate([epoch_order(seed, int(epoch), rows)[places[epochs == epoch] % rows] for epoch in np.unique(epochs)])


def rank_batches(rows: np.ndarray, rank: int, world: int, micro_batch: int) -> list[np.ndarray]:
    """A rank's share of a global batch, cut into micro-batches."""
    mine = rows[rank::world]
    return [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
