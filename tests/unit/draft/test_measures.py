"""The walk, by hand and against a simulated decoder on a toy chain."""

import numpy as np
import pytest

from eagle3_offline.draft.measures import HeldOut, WalkCount, paired_difference, total, walk_answer, walk_hits
from eagle3_offline.records import turn_of_token


def test_walk_by_hand():
    """Answer A B C D E F G at tokens 3..9. Chain of 2: root A hits B, misses C -> product 2, root C; hits D E -> 3, root F; G left."""
    hits = np.zeros((10, 2), bool)
    hits[2] = [True, False]  # root A
    hits[4] = [True, True]  # root C
    hits[7] = [True, True]  # root F: only G is left, so its product is cut to 1
    count = walk_hits(((3, 10),), hits)
    assert (count.products, count.steps) == (6, 3)  # 7 tokens - 1 request
    assert count.tau == 2.0


def test_no_step_starts_at_the_last_token():
    assert walk_answer(3, 4, lambda root, most: 0).steps == 0
    count = walk_answer(3, 6, lambda root, most: most)
    assert (count.products, count.steps) == (2, 1)


def test_products_are_the_answers_tokens_whatever_the_hits():
    rng = np.random.default_rng(0)
    for _ in range(100):
        length = int(rng.integers(1, 30))
        count = walk_hits(((2, 2 + length),), rng.random((2 + length, 4)) < 0.6)
        assert count.products == length - 1  # generated tokens - requests


def test_walk_equals_a_decoder_on_a_toy_chain():
    """A decoder that drafts, compares and appends gives the walk's products and steps; the all-rows mean is another number."""
    rng = np.random.default_rng(1)
    answer = rng.integers(0, 4, 400)
    guess = np.where(rng.random((400, 4)) < np.linspace(0.8, 0.5, 4), np.roll(answer, -1)[:, None], 9)
    for k in range(4):
        guess[:, k] = np.where(guess[:, k] != 9, np.roll(answer, -1 - k), 9)
    root, steps = 0, 0
    while root < 399:  # greedy speculative decoding, written out
        n = 0
        while n < 4 and root + 1 + n < 400 and guess[root, n] == answer[root + 1 + n]:
            n += 1
        root, steps = min(root + n + 1, 399), steps + 1
    hits = np.zeros((401, 4), bool)
    for p in range(400):
        for k in range(4):
            hits[p, k] = p + 1 + k < 400 and guess[p, k] == answer[p + 1 + k]
    count = walk_hits(((1, 401),), hits)  # row p is the root at token p + 1
    assert (count.products, count.steps) == (399, steps)


def test_held_out_counts_by_hand():
    turns = ((3, 7), (9, 12))  # rows alive at step 0: 2 3 4 8 9; at step 1: 2 3 8
    hits = np.zeros((12, 2), bool)
    hits[[2, 3, 8], 0] = True
    hits[[2, 4], 1] = [True, False]
    totals = HeldOut.empty(2)
    totals.add_hits(turns, turn_of_token(turns, 12), hits)
    assert totals.alive.tolist() == [5, 3]
    assert totals.reached.tolist() == [5, 3]
    assert totals.hit.tolist() == [3, 1]
    summary = totals.summary()
    assert summary["first_root_hit"] == 1.0  # rows 2 and 8
    assert summary["tau_all_rows"] == pytest.approx(1 + (2 + 1 + 0 + 1 + 0) / 5)
    assert summary["answer_tokens"] == 7


def test_a_paired_difference_by_hand():
    base, ours = [WalkCount(4, 4), WalkCount(6, 4)], [WalkCount(4, 2), WalkCount(6, 3)]
    assert total(ours) == WalkCount(10, 5)
    mean, low, high = paired_difference([ours], [base])
    assert mean == pytest.approx(10 / 5 - 10 / 8)
    assert (low, high) == (pytest.approx(6 / 3 - 6 / 4), pytest.approx(4 / 2 - 4 / 4))  # one answer drawn twice
    assert paired_difference([base], [base]) == [0, 0, 0]
    one_token = WalkCount()  # an answer without a step
    assert paired_difference([[*ours, one_token]], [[*base, one_token]]) == [mean, low, high]
    assert paired_difference([[ours[0], one_token]], [[base[0], one_token]]) is None
    assert paired_difference([ours, base], [base, base])[0] == pytest.approx(mean / 2)
