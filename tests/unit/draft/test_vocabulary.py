import numpy as np
import torch

from eagle3_offline.draft.vocabulary import draft_vocabulary


def test_most_frequent_tokens_ids_that_end_a_turn_and_offsets():
    counts = np.array([5, 0, 9, 1, 0, 7, 0, 2])
    vocabulary = draft_vocabulary(counts, 4, always=[6])
    assert vocabulary.target_ids.tolist() == [0, 2, 5, 6]
    assert vocabulary.d2t.tolist() == [0, 1, 3, 3]  # target id = draft id + d2t
    assert vocabulary.t2d(8).nonzero()[0].tolist() == [0, 2, 5, 6]
    assert vocabulary.draft_ids(8).tolist() == [0, -1, 1, -1, -1, 2, 3, -1]
    assert vocabulary.coverage == (5 + 9 + 7) / 24


def test_fewer_tokens_than_asked_for_is_no_error():
    vocabulary = draft_vocabulary(np.array([0, 0, 3, 0]), 3, always=[])
    assert vocabulary.target_ids.tolist() == [0, 1, 2]  # filled with the lowest unused ids
    assert len(draft_vocabulary(np.ones(4), 100, always=[]).target_ids) == 4


def test_torch_and_numpy_agree_on_the_offsets():
    vocabulary = draft_vocabulary(np.arange(50), 20, always=[1])
    assert torch.equal(torch.arange(20) + torch.from_numpy(vocabulary.d2t), torch.from_numpy(vocabulary.target_ids))
