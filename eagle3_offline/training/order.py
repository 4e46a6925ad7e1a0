"""Which rows an optimiser step sees: a function of (seed, epoch, number of rows) alone, whatever the ranks.

The rows of all epochs stand in one line, each epoch shuffled by its own seed; step s takes the next batch of the line. Nothing is
dropped: a batch may reach into the next epoch. Rank r of w takes every w-th row of a batch, from the r-th on; with a budget of tokens
the batch is packed first, and rank r takes every w-th pack. A step's loss is a sum over its rows, however they are split.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(2)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of range(rows)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def epochs_done(steps: int, batch_size: int, rows: int) -> int:
    """Whole epochs behind so many steps."""
    return steps * batch_size // rows


def last_step(total_steps: int, epochs: int, batch_size: int, rows: int) -> int:
    """Steps of a training that ends with its total_steps, or with the batch that completes its epochs (0: any number)."""
    return min(total_steps, -(-epochs * rows // batch_size)) if epochs else total_steps


def step_rows(seed: int, step: int, batch_size: int, rows: int) -> np.ndarray:
    """Row numbers of a step's global batch: [batch_size]."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // rows
    return np.concatenate([epoch_order(seed, int(epoch), rows)[places[epochs == epoch] % rows] for epoch in np.unique(epochs)])


def rank_batches(rows: np.ndarray, rank: int, world: int, micro_batch: int) -> list[np.ndarray]:
    """A rank's share of a global batch, cut into micro-batches."""
    mine = rows[rank::world]
    return [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]


def rank_packs(rows: np.ndarray, lengths: np.ndarray, rank: int, world: int, most: int) -> list[np.ndarray]:
    """A rank's share of a global batch, packed into micro-batches of at most `most` tokens; a longer row is alone in its own.

    First fit, the longest row first. As many packs a rank: the fullest ones are halved until their number is a multiple of the ranks'.
    lengths [len(rows)] tokens of each row.
    """
    packs: list[list[int]] = []  # places in `rows`
    tokens = lambda pack: int(lengths[pack].sum())  # noqa: E731
    for place in np.argsort(-lengths, kind="stable").tolist():
        fits = next((pack for pack in packs if tokens(pack) + lengths[place] <= most), None)
        if fits is None:
            packs.append([place])
        else:
            fits.append(place)
    while len(packs) % world:
        fullest = max((pack for pack in packs if len(pack) > 1), key=tokens)
        packs.append(fullest[1::2])
        fullest[:] = fullest[::2]
    return [rows[pack] for pack in sorted(packs, key=tokens, reverse=True)[rank::world]]
