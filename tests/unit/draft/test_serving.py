"""Drafting step by step with a key/value cache, as a server does, gives the training unroll's logits."""

import dataclasses

import numpy as np
import pytest
import torch

from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.model import new_head
from eagle3_offline.draft.serving import ChainDrafter
from eagle3_offline.draft.shift import serving_rows
from eagle3_offline.draft.unroll import unroll
from eagle3_offline.records import turn_of_token

from .conftest import TURNS

K = 3


@pytest.mark.parametrize("flags", [{}, {"fc_norm": True, "norm_output": True}])
def test_cached_drafting_equals_the_unroll(settings, head, sample, embed, target_ids, flags):
    head = new_head(dataclasses.replace(settings, **flags), seed=5) if flags else head.float()
    embed = embed.float()
    batch = collate([sample], K)
    trained = unroll(head, batch, embed, K)
    aux = torch.from_numpy(sample.aux).float()
    tokens = torch.from_numpy(sample.input_ids.astype(np.int64))
    turn = turn_of_token(TURNS, 12)
    drafter, seen, compared = ChainDrafter(head, embed, target_ids), 0, 0
    for row in serving_rows(turn, 0).tolist():  # the features arrive in pieces of several lengths, as after verifications
        drafter.extend(aux[seen : row + 1], tokens[seen + 1 : row + 2])
        seen = row + 1
        length = sum(row in serving_rows(turn, k) for k in range(K))
        follow = tokens[row + 2 : row + 2 + K].tolist()
        for k, logits in enumerate(drafter.chain_logits(follow, length)):
            place = batch.steps[k].rows.tolist().index(row)
            assert torch.allclose(logits, trained[k][place], atol=1e-5)
            compared += 1
    assert compared == 9  # 5 rows at step 0, 3 at step 1, 1 at step 2


def test_a_chain_reads_its_own_drafts(head, sample, embed, target_ids):
    """Free-running and fed with its own proposals, a chain gives the same logits, and leaves the cache as it was."""
    drafter = ChainDrafter(head.float(), embed.float(), target_ids)
    drafter.extend(torch.randn(5, 48), torch.arange(5))
    drafted = drafter.draft(4)
    again = [int(target_ids[z.argmax()]) for z in drafter.chain_logits(drafted, 4)]
    assert drafted == again == drafter.draft(4)
    assert len(drafter.keys) == 5
