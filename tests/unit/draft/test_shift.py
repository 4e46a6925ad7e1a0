"""The shift and the serving mask, against values written by hand.

t       0  1  2  3  4  5  6  7  8  9 10 11
token   s  u  u  A  B  C  D  u  u  E  F  G       A B C D first answer, E F G second
turn    0  0  0  1  1  1  1  0  0  2  2  2
"""

import numpy as np
import pytest

from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.shift import first_root, input_token, predicted_token, serving_rows
from eagle3_offline.records import turn_of_token

from .conftest import TURNS

BY_HAND = {
    0: [2, 3, 4, 8, 9],  # A>B B>C C>D, E>F F>G
    1: [2, 3, 8],  # A B>C, B C>D, E F>G
    2: [2],  # A B C>D
    3: [],
    9: [],
    10: [],
    11: [],
}


@pytest.mark.parametrize("step, rows", BY_HAND.items())
def test_serving_rows_by_hand(step, rows):
    assert serving_rows(turn_of_token(TURNS, 12), step).tolist() == rows


def test_serving_rows_follow_the_formula():
    """m[p+1] * m[p+2+k], both inside the same turn, for adjacent turns too (a tool call's answer may follow an answer)."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        turn = np.repeat(rng.integers(0, 3, 6), rng.integers(1, 5, 6))
        for step in range(5):
            expected = [p for p in range(len(turn)) if p + 2 + step < len(turn) and turn[p + 1] and turn[p + 1] == turn[p + 2 + step]]
            assert serving_rows(turn, step).tolist() == expected


def test_what_a_row_reads_and_predicts():
    row = np.array([2])
    assert (input_token(row, 0).item(), predicted_token(row, 0).item()) == (3, 4)  # feature u, reads A, predicts B
    assert (input_token(row, 2).item(), predicted_token(row, 2).item()) == (5, 6)  # reads C, predicts D
    assert first_root(3) == 2


def test_collate_by_hand(sample):
    batch = collate([sample, sample], 3)
    x = sample.input_ids
    assert batch.segments == ((0, 11), (11, 22))
    assert batch.tokens[:11].tolist() == x[1:].tolist()
    first, second = batch.steps[0], batch.steps[1]
    assert first.rows.tolist() == [2, 3, 4, 8, 9, 13, 14, 15, 19, 20]
    assert second.rows.tolist() == [2, 3, 8, 13, 14, 19]
    assert second.kept.tolist() == [0, 1, 3, 5, 6, 8]  # their places among step 0's rows
    assert second.positions[:3].tolist() == [3, 4, 9]  # p + 1
    assert second.tokens[:3].tolist() == x[[4, 5, 10]].tolist()
    assert second.predicted[:3].tolist() == x[[5, 6, 11]].tolist()
    assert sample.last_positions[second.teacher[:3]].tolist() == [4, 5, 10]  # the teacher sits where the token is read


def test_a_missing_teacher_is_an_error(sample):
    import dataclasses

    cut = dataclasses.replace(sample, last=sample.last[:-3], last_positions=sample.last_positions[:-3])
    with pytest.raises((ValueError, IndexError)):
        collate([cut], 1)
