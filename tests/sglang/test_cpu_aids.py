"""The stand-in kernels against values written by hand; the served draft (test_draft.py) shows that they are what SGLang means."""

import pytest
import torch


@pytest.fixture
def kernels(sglang):
    import sgl_kernel

    return sgl_kernel


def tree(kernels, parents, selected, length, topk, tokens):
    """Mask [D, D], positions, next child and next sibling of one request's tree."""
    mask = torch.ones(tokens * tokens, dtype=torch.bool)
    positions = torch.empty(tokens, dtype=torch.long)
    index, child, sibling = torch.full((3, 1, tokens), -1)
    kernels.build_tree_kernel_efficient_cpu(
        torch.tensor([parents]), torch.tensor([selected]), torch.tensor([length]), mask, positions,
        index, child, sibling, topk, 3, tokens, 1,
    )  # fmt: skip
    return mask.view(tokens, tokens).int().tolist(), positions.tolist(), index, child, sibling


def test_a_chain(kernels):
    """root - a - b: each token sees those before it."""
    mask, positions, _, child, sibling = tree(kernels, [-1, 0], [0, 1], 7, 1, 3)
    assert mask == [[1, 0, 0], [1, 1, 0], [1, 1, 1]] and positions == [7, 8, 9]
    assert child.tolist() == [[1, 2, -1]] and sibling.tolist() == [[-1, -1, -1]]


def test_a_tree_and_its_walk(kernels):
    """The root has children 1 and 2, token 1 has child 3: positions 7, 8, 8, 9.

    Ids of drafts: the root's two are 0 and 1; the first one's two are 2 and 3. Group 1 (ids 2, 3) hangs under draft 0.
    """
    mask, positions, index, child, sibling = tree(kernels, [-1, 0, 1], [0, 1, 2], 7, 2, 4)
    assert mask == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 0, 1],
    ]
    assert positions == [7, 8, 8, 9]
    assert child.tolist() == [[1, 3, -1, -1]] and sibling.tolist() == [[-1, 2, -1, -1]]
    candidates = torch.tensor([[50, 60, 61, 70]])

    def walk(target):
        predicts, accepted, count = torch.zeros(4, dtype=torch.int32), torch.full((1, 3), -1), torch.zeros(1, dtype=torch.int32)
        kernels.verify_tree_greedy_cpu(
            predicts, accepted, count, candidates, retrive_index=index, retrive_next_token=child,
            retrive_next_sibling=sibling, target_predict=torch.tensor([target]),
        )  # fmt: skip
        return accepted.tolist()[0], count.item(), predicts.tolist()

    assert walk([60, 70, 0, 9]) == ([0, 1, 3], 2, [60, 70, 0, 9])  # both drafts, then the target's own 9
    assert walk([61, 0, 8, 0]) == ([0, 2, -1], 1, [61, 0, 8, 0])  # the sibling
    assert walk([5, 0, 0, 0]) == ([0, -1, -1], 0, [5, 0, 0, 0])  # none


def test_slots(kernels):
    table = torch.zeros(3, 6, dtype=torch.int32)
    rows, start, end = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([3, 3])
    kernels.assign_req_to_token_pool_cpu(rows, table, start, end, torch.tensor([11, 12, 21, 22, 23]), 6)
    assert table.tolist() == [[21, 22, 23, 0, 0, 0], [0] * 6, [0, 11, 12, 0, 0, 0]]
    out = torch.zeros(4, dtype=torch.long)
    kernels.assign_draft_cache_locs_contiguous_cpu(rows, table, torch.tensor([1, 0]), out, 6, 1, 2)
    assert out.tolist() == [11, 12, 21, 22]


def test_cache_slots_are_copied_in_every_layer_without_treading_on_each_other(kernels):
    layers = [torch.arange(8.0).view(4, 2) + 10 * n for n in range(2)]
    pointers, strides = torch.tensor([layer.data_ptr() for layer in layers]), torch.tensor([8, 8])
    kernels.copy_all_layer_kv_cache_cpu(pointers, strides, torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert layers[1].tolist() == [[12, 13], [14, 15], [14, 15], [16, 17]]


def test_attention_is_the_plain_one(kernels):
    """Four tokens of which the last two are new, then one more by decoding: against softmax written out."""
    torch.manual_seed(0)
    q, keys, values = torch.randn(4, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    slots = torch.tensor([[5, 1, 7, 2, 0, 0]])

    def plain(query, count):
        k, v = (cache[slots[0, :count]].repeat_interleave(2, 1) for cache in (keys, values))
        return torch.einsum("th,thd->hd", (torch.einsum("hd,thd->th", query, k) * 0.5).softmax(0), v)

    out = torch.zeros(2, 4, 8)
    one = torch.tensor([0]), torch.tensor([4]), torch.tensor([2]), torch.tensor([0])
    kernels.extend_attention_cpu(q[:2], None, None, out, keys, values, 1.0, 1.0, slots, *one, 2, 0.5, 0.0, False, 0, None, None, None, True)
    assert torch.allclose(out[0], plain(q[0], 3), atol=1e-6) and torch.allclose(out[1], plain(q[1], 4), atol=1e-6)
    decoded = torch.zeros(1, 4, 8)
    kernels.decode_attention_cpu(
        q[2:3], keys, values, 1.0, 1.0, decoded, None, None, torch.tensor([2]), None, slots, torch.tensor([0]), torch.tensor([4]),
        0.5, 0.0, False, 0, None, None,
    )  # fmt: skip
    assert torch.allclose(decoded[0], plain(q[2], 4), atol=1e-6)
    with pytest.raises(NotImplementedError, match="sinks"):
        kernels._refuse(1.0, 1.0, 0.0, False, torch.zeros(1))
