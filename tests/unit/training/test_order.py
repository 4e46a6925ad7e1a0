"""Sample order depends on (seed, epoch, rows) alone; nothing is dropped or repeated, whatever the ranks."""

import numpy as np
import pytest

from eagle3_offline.training.order import epoch_order, last_step, rank_batches, rank_packs, step_rows


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


def test_the_last_step():
    assert last_step(100, 0, 4, 10) == 100
    assert last_step(100, 2, 4, 10) == 5 and last_step(100, 3, 4, 10) == 8  # the eighth batch reaches into the fourth epoch
    assert last_step(7, 3, 4, 10) == 7


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world):
    rows = step_rows(0, 3, 8, 100)
    shares = [rank_batches(rows, rank, world, 2) for rank in range(world)]
    assert sorted(int(i) for share in shares for piece in share for i in piece) == sorted(rows.tolist())
    assert {len(share) for share in shares} == {8 // world // 2}


def test_packs_by_hand():
    """First fit, longest first, at most 10 tokens: 7+3, 5+4, and 12 alone."""
    rows, lengths = np.array([20, 21, 22, 23, 24]), np.array([5, 12, 3, 7, 4])
    packs = [pack.tolist() for pack in rank_packs(rows, lengths, 0, 1, 10)]
    assert packs == [[21], [23, 22], [20, 24]]
    halved = [[pack.tolist() for pack in rank_packs(rows, lengths, rank, 2, 10)] for rank in range(2)]
    assert halved == [[[21], [23]], [[20, 24], [22]]]  # three packs for two ranks: the fullest with two rows became two


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_rank_has_as_many_packs_and_every_row_is_in_one(world):
    rng = np.random.default_rng(0)
    for most in (1, 100, 300, 10**6):
        rows, lengths = rng.permutation(8), rng.integers(1, 200, 8)
        shares = [rank_packs(rows, lengths, rank, world, most) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(int(i) for share in shares for pack in share for i in pack) == list(range(8))
        tokens = dict(zip(rows.tolist(), lengths.tolist(), strict=True))
        assert all(len(pack) == 1 or sum(tokens[int(i)] for i in pack) <= most for share in shares for pack in share)
