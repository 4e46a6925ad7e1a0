"""Every fast path of a training step against its slow twin."""

import pytest
import torch

from eagle3_offline.draft import attention, fused, products
from eagle3_offline.draft import teacher as draft_teacher
from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.teacher import FullTeacher, argmax
from eagle3_offline.draft.unroll import unroll

K = 3


def gradients(head, samples, embed):
    """The logits of all steps, and the gradients of a sum that weighs each differently."""
    logits = torch.cat(unroll(head, collate(samples, K), embed, K))
    head.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in head.parameters())]


def assert_equal(found, expected, tolerance=1e-10):
    assert all(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(found, expected, strict=True))


def test_conversations_side_by_side_equal_one_at_a_time(head, samples, embed):
    together = unroll(head, collate(samples, K), embed, K)
    alone = [unroll(head, collate([s], K), embed, K) for s in samples]
    for k in range(K):
        assert torch.allclose(together[k], torch.cat([logits[k] for logits in alone]), atol=1e-12)


@pytest.mark.parametrize("block_rows", [1, 3, 100])
def test_blockwise_attention_equals_the_reference(head, samples, embed, monkeypatch, block_rows):
    monkeypatch.setitem(attention.BLOCK_SCORES, "cpu", block_rows * 4 * 11)  # 4 heads, at most 11 step-0 rows
    found = {}
    for head.attention in ("reference", "blockwise"):
        found[head.attention] = gradients(head, samples, embed)
    assert_equal(found["blockwise"], found["reference"])


def test_sdpa_equals_the_reference(head, samples, embed, monkeypatch):
    """Neighbours in one call, each alone, and two queries a call."""
    found = {}
    for rows, queries in ((512, 192), (1, 192), (512, 2)):
        monkeypatch.setattr(attention, "GROUP_ROWS", rows)
        monkeypatch.setattr(fused, "PIECE_QUERIES", queries)
        for head.attention in ("reference", "sdpa"):
            found[head.attention] = gradients(head, samples, embed)
        assert_equal(found["sdpa"], found["reference"])


def test_pieces_of_a_group_leave_out_the_keys_that_no_query_of_theirs_sees(monkeypatch):
    """Batch rows 10 .. 18 are two conversations, a b c d e and f g h i; queries 3 .. 7 of the batch are those of b, c, e, g, h."""
    monkeypatch.setattr(fused, "PIECE_QUERIES", 2)
    group = fused.Group(slice(3, 8), slice(10, 19), torch.tensor([1, 2, 4, 6, 7]), torch.tensor([0, 0, 0, 5, 5]))
    found = [(queries, keys, rows.tolist(), begins.tolist()) for queries, keys, rows, begins in fused._pieces(group)]
    assert found == [
        (slice(3, 4), slice(10, 12), [1], [0]),  # b on a b
        (slice(4, 6), slice(10, 15), [2, 4], [0, 0]),  # c, e on a b c d e
        (slice(6, 8), slice(15, 18), [1, 2], [0, 0]),  # g, h on f g h
    ]
    assert list(fused._pieces(group._replace(rows=torch.tensor([]), begins=None))) == []


@pytest.mark.parametrize("queries", [192, 3])
@pytest.mark.parametrize(
    "dtype, tolerance, units", [(torch.float32, 1e-5, False), (torch.bfloat16, 2e-2, False), (torch.bfloat16, 2e-2, True)]
)
def test_sdpa_in_narrow_dtypes(dtype, tolerance, units, queries, monkeypatch):
    """With matrix units the kernel is called with more queries and keys than a piece has."""
    monkeypatch.setattr(fused, "cpu_has_matrix_units", lambda: units)
    monkeypatch.setattr(fused, "PIECE_QUERIES", queries)
    assert_near_the_reference("sdpa", "cpu", dtype, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_kernels_of_a_gpu(backend):
    assert_near_the_reference(backend, "cuda", torch.bfloat16, 2e-2)


def assert_near_the_reference(backend, device, dtype, tolerance):
    """Results and gradients against the reference's in float64, relative to the largest value, at steps 0 and 2.

    Three conversations of 30, 5 and 25 rows, of which 18, 0 and 11 are queries, with gaps; keys and values are halves of one tensor.
    """
    torch.manual_seed(0)
    rows = torch.cat((torch.arange(3, 12), torch.arange(20, 29), torch.arange(40, 51))).to(device)
    conversations = [attention.Conversation(*c) for c in ((0, 30, 18), (30, 35, 0), (35, 60, 11))]
    for own in (0, 2):
        shapes = [(29, 6, 8), (60, 4, 8), (29, 2, own, 8), (29, 2, own, 8)]  # queries, keys and values, own keys, own values
        given, upstream = [torch.randn(shape).to(device, dtype) for shape in shapes], torch.randn(29, 6, 8).to(device, dtype)
        found = {}
        for name, of in (("reference", torch.float64), (backend, dtype)):
            query, both, *owns = leaves = [tensor.to(of).requires_grad_() for tensor in given]
            out = attention.attend(query, rows, *both.chunk(2, dim=1), *owns, conversations, name)
            out.backward(upstream.to(of))
            found[name] = [out.detach(), *(leaf.grad for leaf in leaves if leaf.numel())]
        for a, b in zip(found[backend], found["reference"], strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_auto_is_sdpa_on_a_cpu(head, samples, embed, monkeypatch):
    calls, plain = [], attention.MaskedKernel.forward
    monkeypatch.setattr(attention.MaskedKernel, "forward", lambda self, query, *more: calls.append(len(query)) or plain(self, query, *more))
    assert head.attention == "auto"
    unroll(head, collate(samples, K), embed, 1)
    assert calls == [5 + 4 + 0 + 9]


def test_auto_goes_by_blocks_elsewhere_where_a_conversation_is_long(monkeypatch):
    """Of queries x rows: 5 x 11 and 9 x 11 are long, 4 x 9 is not."""
    monkeypatch.setattr(attention, "AUTO_SCORES", 4 * 11)
    long, short, longer = (attention.Conversation(*c) for c in ((0, 11, 5), (11, 20, 4), (20, 31, 9)))
    assert [attention._by_blocks(c, "auto") for c in (long, short, longer)] == [True, False, True]
    assert attention._neighbours([short, long, longer, short, short], "auto") == [[short], [long], [longer], [short, short]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_reference(head, samples, embed):
    """On a CPU flex_attention has no gradient, so that only its result is compared."""
    found = {}
    with torch.no_grad():
        for head.attention in ("reference", "flex"):
            found[head.attention] = unroll(head, collate(samples, K), embed, K)
    assert_equal(found["flex"], found["reference"])


@pytest.mark.parametrize("backend", ["reference", "blockwise", "sdpa"])
def test_checkpointed_activations_change_nothing(head, samples, embed, backend):
    head.attention, found = backend, {}
    for head.checkpoint_activations in (False, True):
        found[head.checkpoint_activations] = gradients(head, samples, embed)
    assert_equal(found[True], found[False], 0)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_filled_rows_and_summed_weights_change_nothing(head, samples, embed, monkeypatch, checkpoint):
    """What a CPU does in bfloat16, here in float64."""
    plain = gradients(head, samples, embed)
    monkeypatch.setattr(products, "_compiled", lambda x: True)
    head.checkpoint_activations = checkpoint
    assert_equal(gradients(head, samples, embed), plain)


def test_an_argmax_is_kept_for_later_epochs(samples, lm_head, target_ids, monkeypatch):
    """Of each conversation, in whatever batch it comes again."""
    teacher, (a, b, *_) = FullTeacher(lm_head, target_ids), samples
    expected = {s.id: FullTeacher(lm_head, target_ids)(collate([s], K), whole=True) for s in (a, b)}
    teacher(collate([a], K), whole=True)
    for batch in ([a, b], [b, a]):  # the first is half known, the second known
        found = teacher(collate(batch, K), whole=True)
        for name in ("argmax_known", "true"):
            assert torch.allclose(getattr(found, name), torch.cat([getattr(expected[s.id], name) for s in batch]))
        monkeypatch.setattr(teacher, "argmax_known", None)  # not called again
        monkeypatch.setattr(teacher, "log_normaliser", None)


@pytest.mark.parametrize("spread", [1.0, 0.02])  # 0.02: nearly every row is too near to tell in bfloat16
def test_the_quick_argmax_equals_the_plain_one(monkeypatch, spread):
    monkeypatch.setattr(draft_teacher, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(draft_teacher, "BLOCK", 100)
    torch.manual_seed(0)
    weight = (1 + spread * torch.randn(500, 32)).bfloat16()
    last = (1 + torch.randn(400, 32)).bfloat16()
    target_ids = torch.arange(0, 500, 2)
    teacher = FullTeacher(weight, target_ids)
    assert teacher.quick
    expected = torch.isin(argmax(last, weight.float()), target_ids)
    found = teacher.argmax_known(last, last.float() @ weight.float()[target_ids].T)
    assert torch.equal(found, expected) and expected.any() and not expected.all()


def test_the_quick_argmax_bears_every_error_within_the_bound(monkeypatch):
    """Rounding that differs from call to call, as it does between numbers of rows."""
    monkeypatch.setattr(draft_teacher, "cpu_multiplies_bfloat16", lambda: True)

    def rounded(last, weight, dtype=torch.float32):
        z = last.float() @ weight.float().T
        error = draft_teacher.BFLOAT16_ERROR * (2 * torch.rand(z.shape) - 1).sign() if dtype == torch.bfloat16 else 0.0
        yield slice(0, len(weight)), z * (1 + error)

    torch.manual_seed(0)
    weight, last = (1 + 0.02 * torch.randn(500, 32)).bfloat16(), (1 + torch.randn(500, 32)).bfloat16()
    target_ids = torch.arange(0, 500, 2)
    expected = torch.isin(argmax(last, weight.float()), target_ids)
    monkeypatch.setattr(draft_teacher, "_blocks", rounded)
    teacher = FullTeacher(weight, target_ids)
    products = last.float() @ weight.float()[target_ids].T
    found = [teacher.argmax_known(last[i : i + 1], products[i : i + 1]) for i in range(len(last))]  # else rows lend each other candidates
    assert torch.equal(torch.cat(found), expected)


def test_no_row_is_taken_twice(samples):
    """draft/unroll.py writes the gradients of rows that it takes side by side."""
    batch = collate(samples, K)
    for k, step in enumerate(batch.steps):
        for rows in (step.rows, step.rows + k, step.kept):
            assert len(rows.unique()) == len(rows)
        assert step.rows.max() + k < len(batch.tokens)
