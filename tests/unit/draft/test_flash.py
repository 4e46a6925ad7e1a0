"""The backend `flash`. Its kernel runs on a GPU alone: what surrounds it is tested with a plain one of the same signature.

The plain one computes in float64 and answers in the dtypes of the true one: outputs and gradients as the queries, sums in fp32 or wider.
"""

import pytest
import torch

from eagle3_offline.draft import attention
from eagle3_offline.draft.fused import wide

from .test_fast_paths import assert_equal, assert_near_the_reference, gradients


def conversations(bounds, query, key, value, scale, causal):
    """Of each conversation its rows and the scores [kv, g, t, t] of its queries, which are grouped by the key/value head that they read."""
    assert bounds.dtype == torch.int32 and causal
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q = query[a:b].double().unflatten(1, (key.shape[1], -1))
        scores = scale * torch.einsum("pkgd,jkd->kgpj", q, key[a:b].double())
        yield slice(a, b), q, scores.masked_fill(~torch.ones(b - a, b - a, dtype=torch.bool).tril(), -torch.inf)


def forward(query, key, value, bounds, _, longest, __, dropout, causal, return_debug_mask, *, scale, **__more):
    """As torch's meta function for it: the log-sum-exp is [h, T]."""
    assert longest == int(bounds.diff().max()) and dropout == 0 and not return_debug_mask
    out, log_sum = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query), dtype=wide(query))
    for rows, _q, scores in conversations(bounds, query, key, value, scale, causal):
        out[rows] = torch.einsum("kgpj,jkd->pkgd", scores.softmax(-1), value[rows].double()).flatten(1, 2).to(out)
        log_sum[:, rows] = scores.logsumexp(-1).flatten(0, 1).to(log_sum)
    return out, log_sum, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def backward(gradient, query, key, value, out, log_sum, bounds, _, longest, __, dropout, causal, ___, ____, *, scale, **_more):
    """P from the log-sum-exp that it is given, dS = P (dO V^T - dO . O), as the kernel does (FlashAttention-2, algorithm 2)."""
    assert log_sum.is_contiguous() and out.is_contiguous() and gradient.is_contiguous()
    assert log_sum.dtype == wide(query) and {x.dtype for x in (gradient, key, value, out)} == {query.dtype}
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, q, scores in conversations(bounds, query, key, value, scale, causal):
        grouped = lambda x: x[rows].double().unflatten(1, (key.shape[1], -1))  # noqa: B023, E731
        weights = (scores - log_sum[:, rows].double().unflatten(0, (key.shape[1], -1))[..., None]).exp()
        delta = (grouped(gradient) * grouped(out)).sum(-1).permute(1, 2, 0)[..., None]  # [kv, g, t, 1]
        ds = scale * weights * (torch.einsum("pkgd,jkd->kgpj", grouped(gradient), value[rows].double()) - delta)
        dq[rows] = torch.einsum("kgpj,jkd->pkgd", ds, key[rows].double()).flatten(1, 2).to(dq)
        dk[rows] = torch.einsum("kgpj,pkgd->jkd", ds, q).to(dk)
        dv[rows] = torch.einsum("kgpj,pkgd->jkd", weights, grouped(gradient)).to(dv)
    return dq, dk, dv


@pytest.fixture
def plain_kernel(monkeypatch):
    monkeypatch.setitem(attention.DEVICES, "flash", "cpu")
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield


@pytest.mark.usefixtures("plain_kernel")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_flash_equals_the_reference(head, samples, embed, monkeypatch, checkpointed):
    monkeypatch.setattr(attention, "_check_kernel", lambda *_: None)  # float64
    head.checkpoint_activations, found = checkpointed, {}
    for head.attention in ("reference", "flash"):
        found[head.attention] = gradients(head, samples, embed)
    assert_equal(found["flash"], found["reference"])


@pytest.mark.usefixtures("plain_kernel")
def test_flash_in_bfloat16():
    assert_near_the_reference("flash", "cpu", torch.bfloat16, 2e-2)


@pytest.mark.parametrize(
    "backend, device, dtype, head_dim, found",
    [
        ("sdpa", "meta", torch.float32, 8, "the draft is on meta"),
        ("flash", "cpu", torch.bfloat16, 8, "the draft is on cpu"),
        ("flash", "cuda", torch.float32, 8, "the draft is in torch.float32 with a head_dim of 8"),
        ("flash", "cuda", torch.bfloat16, 12, "the draft is in torch.bfloat16 with a head_dim of 12"),
        ("flash", "cuda", torch.bfloat16, 264, "the draft is in torch.bfloat16 with a head_dim of 264"),
    ],
)
def test_a_kernel_that_cannot_do_it_is_refused(monkeypatch, backend, device, dtype, head_dim, found):
    x = torch.zeros(3, 2, head_dim, device="cpu" if device == "cuda" else device, dtype=dtype)
    if device == "cuda":
        monkeypatch.setitem(attention.DEVICES, "flash", "cpu")
    with pytest.raises(attention.UserError, match=f"train.attention is {backend}, which needs a .*, and {found}: leave it at auto"):
        attention.attend(x, torch.arange(3), x, x, *2 * [attention.no_own(x, 3)], backend=backend)
