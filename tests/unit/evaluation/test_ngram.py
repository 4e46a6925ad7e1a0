import numpy as np

from eagle3_offline.evaluation.ngram import NgramLookup


def test_walk_by_hand():
    """Answer 5 6 7 5 6 7 8 after the prompt 1 2. Own context: the second '5' was followed by 6 7 5."""
    lookup = NgramLookup([], longest=3)
    count = lookup.walk(np.array([1, 2, 5, 6, 7, 5, 6, 7, 8]), ((2, 9),), chain=4)
    # roots: 5 (unknown: 1), 6 (unknown: 1), 7 (unknown: 1), 5 (seen: proposes 6 7 5, two hit: 3) -> root 8, the last token
    assert (count.products, count.steps) == (6, 4)


def test_train_answers_and_longer_suffixes_come_first():
    lookup = NgramLookup([np.array([9, 3, 4, 4, 4])], longest=2)
    # root 3 with 9 before it: (9, 3) occurs in the train answer -> proposes 4 4 4; the own context knows 3 -> 1
    count = lookup.walk(np.array([3, 1, 9, 3, 4, 4, 4]), ((3, 7),), chain=4)
    assert (count.products, count.steps) == (3, 1)


def test_an_answers_end_hides_no_earlier_place():
    """(3, 4) ends the train answer, where nothing follows; its earlier place was followed by 5."""
    lookup = NgramLookup([np.array([3, 4, 5, 7, 3, 4])], longest=2)
    count = lookup.walk(np.array([9, 3, 4, 5, 7]), ((2, 5),), chain=2)  # root 4 behind 3: proposes 5 7, both hit
    assert (count.products, count.steps) == (2, 1)
