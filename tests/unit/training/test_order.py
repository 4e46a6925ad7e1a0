"""Sample order depends on (seed, epoch, rows) alone; nothing is dropped or repeated, whatever the ranks."""

import numpy as np
import pytest

from eagle3_offline.training.order import epoch_order, rank_batches, step_rows


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(0, epoch, 50).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] and epoch_order(0, 1, 50).tolist() == orders[1]
    assert epoch_order(1, 0, 50).tolist() != orders[0]


@pytest.mark.parametrize("rows, batch", [(10, 4), (12, 4), (3, 8), (7, 1)])
def test_nothing_is_dropped_or_repeated(rows, batch):
    steps = 3 * rows  # whole epochs: 3 * batch of them
    line = np.concatenate([step_rows(5, step, batch, rows) for step in range(steps)])
    for epoch in line.reshape(-1, rows):
        assert sorted(epoch.tolist()) == list(range(rows))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world):
    rows = step_rows(0, 3, 8, 100)
    shares = [rank_batches(rows, rank, world, 2) for rank in range(world)]
    assert sorted(int(i) for share in shares for piece in share for i in piece) == sorted(rows.tolist())
    assert {len(share) for share in shares} == {8 // world // 2}
