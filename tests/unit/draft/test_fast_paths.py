"""Every fast path of a training step against its slow twin."""

import pytest
import torch

from eagle3_offline.draft import teacher as draft_teacher
from eagle3_offline.draft import unroll as draft_unroll
from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.model import RMSNorm
from eagle3_offline.draft.teacher import FullTeacher, argmax
from eagle3_offline.draft.unroll import groups, unroll

from .conftest import make_sample

K = 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_norm_equals_torchs(dtype, tolerance):
    torch.manual_seed(0)
    ours = RMSNorm(48, 1e-5).to(dtype)
    theirs = torch.nn.RMSNorm(48, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(48))
        theirs.weight.copy_(ours.weight)
    x = (torch.randn(7, 48) * 5).to(dtype)
    found = []
    for norm in (ours, theirs):
        mine = x.clone().requires_grad_()
        y = norm(mine)
        (y * torch.linspace(-1, 1, 48).to(dtype)).sum().backward()
        found.append((y, mine.grad, norm.weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=tolerance) and a.dtype == b.dtype


def test_the_norms_gradient_by_finite_differences():
    norm = RMSNorm(6, 1e-5).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


def test_neighbours_share_an_attention_call():
    segments = ((0, 200), (200, 500), (500, 600), (600, 1400), (1400, 1450))
    assert groups(segments) == [(0, 500, [0, 1]), (500, 600, [2]), (600, 1400, [3]), (1400, 1450, [4])]


@pytest.mark.parametrize("rows", [1, 20, 512])
def test_grouped_attention_equals_one_conversation_at_a_time(head, sample, embed, monkeypatch, rows):
    monkeypatch.setattr(draft_unroll, "GROUP_ROWS", rows)
    samples = [
        sample,
        make_sample("b", 10, ((4, 9),), seed=8),
        make_sample("dead", 5, ((3, 4),), seed=9),
        make_sample("c", 12, ((2, 12),), 7),
    ]
    together = unroll(head, collate(samples, K), embed, K)
    alone = [unroll(head, collate([s], K), embed, K) for s in samples]
    for k in range(K):
        assert torch.allclose(together[k], torch.cat([logits[k] for logits in alone]), atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-3])  # 1e-3: every row is too near to tell in bfloat16
def test_the_quick_argmax_equals_the_plain_one(monkeypatch, spread):
    monkeypatch.setattr(draft_teacher, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(draft_teacher, "BLOCK", 100)
    torch.manual_seed(0)
    weight = (1 + spread * torch.randn(500, 32)).bfloat16()
    last = (1 + torch.randn(400, 32)).bfloat16()
    target_ids = torch.arange(0, 500, 2)
    teacher = FullTeacher(weight, target_ids)
    assert teacher.outside is not None
    expected = torch.isin(argmax(last, weight.float()), target_ids)
    found = teacher.argmax_known(last, last.float() @ weight.float()[target_ids].T)
    assert torch.equal(found, expected) and expected.any() and not expected.all()
