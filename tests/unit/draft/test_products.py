"""Products whose rows are filled up: the same values and gradients as without."""

import pytest
import torch
from torch.nn import functional as F

from eagle3_offline.draft import loss as draft_loss
from eagle3_offline.draft import products
from eagle3_offline.draft.model import RMSNorm
from eagle3_offline.draft.products import (
    Linear,
    exact_product,
    filled,
    laid_out,
    linear,
    product,
    round_up,
    shared_weights,
    summed,
    weight_gradient,
)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (7, 7), (9, 10), (15, 16), (130, 160), (640, 640), (641, 768), (769, 896)])
def test_a_count_has_three_significant_bits(count, expected):
    assert round_up(count) == expected


def test_few_counts_are_left_and_few_rows_are_added():
    counts = range(16, 4097)
    assert len({round_up(n) for n in counts}) <= 8 * 4 + 1
    assert all(n <= round_up(n) <= n * 5 / 4 for n in counts)


@pytest.mark.parametrize("rows", [0, 5, 33, 71])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_filled_product_and_its_gradients(rows, dtype):
    torch.manual_seed(0)
    x, weight, gradient = (torch.randn(shape).to(dtype) for shape in ((rows, 24), (40, 24), (rows, 40)))
    assert (len(filled(x)) > rows) == (dtype == torch.bfloat16 and round_up(rows) > rows)
    found, plain = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    out, expected = linear(*found), F.linear(*(t.double() for t in plain))
    out.backward(gradient)
    expected.backward(gradient.double())
    error = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert out.dtype == dtype and torch.allclose(out.double(), expected, atol=error, rtol=error)
    for mine, other in zip(found, plain, strict=True):
        assert torch.allclose(mine.grad.double(), other.grad.double(), atol=error, rtol=error)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [4, 7, 9])
def test_a_product_in_two_calls(rows, threads, monkeypatch):
    monkeypatch.setattr(products, "LONE_ROWS", range(5, 9))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *x, **out: calls.append(len(x[0])) or real(*x, **out))
    x, y = torch.randn(rows, 24).bfloat16(), torch.randn(24, 40).bfloat16()
    found = product(x, y)
    assert calls == ([4, 3] if (rows, threads) == (7, 2) else [])
    assert torch.allclose(found.double(), x.double() @ y.double(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (48, 24), (24, 48)])  # turned are: neither, x, the gradient
@pytest.mark.parametrize("rows", [0, 5, 130])
def test_the_gradient_of_a_weight_however_it_is_made(rows, outputs, inputs, compiled, monkeypatch):
    monkeypatch.setattr(products, "_compiled", lambda x: compiled)
    gradient, x = torch.randn(rows, outputs, dtype=torch.float64), torch.randn(rows, inputs, dtype=torch.float64)
    once = weight_gradient(gradient, x)
    assert torch.allclose(once, gradient.T @ x, atol=1e-12)
    assert once.is_contiguous() != (compiled and outputs == 48) and laid_out(once).is_contiguous()
    twice = weight_gradient(gradient, x, once)
    assert twice is once and torch.allclose(laid_out(twice), 2 * gradient.T @ x, atol=1e-12)


@pytest.mark.parametrize("outputs", [40, 48])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("uses", [0, 1, 3])
def test_the_gradient_of_a_weight_that_several_products_read(uses, others, outputs, monkeypatch):
    """In float64, as if it were compiled; `others`: something that is no product reads it too."""
    inputs, start = (
        [torch.randn(rows, 24, dtype=torch.float64) for rows in (5, 9, 33)[:uses]],
        torch.randn(outputs, 24, dtype=torch.float64),
    )
    found = []
    for share in (lambda weight: weight, summed):
        weight = start.clone().requires_grad_()
        shared = share(weight)
        out = sum((linear(x, shared).square().sum() for x in inputs), shared[:7].pow(3).sum() if others else 0 * weight.sum())
        out.backward(retain_graph=True)
        out.backward()  # nothing is left over from the first pass
        found.append(weight.grad)
        monkeypatch.setattr(products, "_compiled", lambda x: True)
    assert torch.allclose(*found, atol=1e-12)


def test_shared_weights_hold_for_their_block_alone(monkeypatch):
    monkeypatch.setattr(products, "_compiled", lambda x: True)
    added, real = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *x: added.append(1) or real(*x))
    layer, x = Linear(24, 40), torch.randn(5, 24)
    with pytest.raises(RuntimeError, match="in the block"), shared_weights(layer):
        inside = layer(x) + layer(2 * x)
        raise RuntimeError("in the block")
    inside.sum().backward()
    assert len(added) == 1 and torch.allclose(layer.weight.grad, 3 * x.sum(0).expand(40, 24), atol=1e-5)
    (layer(x) + layer(2 * x)).sum().backward()
    assert len(added) == 1 and torch.allclose(layer.weight.grad, 6 * x.sum(0).expand(40, 24), atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_products_of_bfloat16_values_are_summed_in_fp32(native, monkeypatch):
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: native)
    settings, dtypes = torch.backends.mkldnn.matmul, []
    before = settings.fp32_precision
    x, weight = torch.randn(37, 240).bfloat16(), torch.randn(50, 240).bfloat16()
    found = exact_product(x, weight.float())
    expected = x.double() @ weight.double().T
    assert found.dtype == torch.float32 and (found.double() - expected).abs().max() < 1e-5 * expected.abs().max()
    monkeypatch.setattr(products, "filled", lambda x: dtypes.append(settings.fp32_precision) or x / "not a number")
    if native:
        with pytest.raises(TypeError):
            exact_product(x, weight.float())
    assert dtypes == ["bf16"] * native and settings.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 41])
def test_the_head_in_blocks_and_parts(dtype, rows, monkeypatch):
    """Of 41 rows blocks of 40 and 1, in parts of 5; the loss is a sum of squares, its gradient twice the logits."""
    monkeypatch.setitem(draft_loss.BLOCK_ELEMENTS, "cpu", 33 * 50)
    monkeypatch.setitem(draft_loss.PART_ELEMENTS, "cpu", 5 * 50)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(50, 24).to(dtype)
    starts = []

    def terms(logits, start):
        starts.append((start, len(logits)))
        return logits.square().sum(), 2 * logits

    (mine, own), (other, whole) = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    loss = draft_loss._BlockedHead.apply(mine, own, terms)
    expected = (other.double() @ whole.double().T).square().sum()
    loss.backward()
    expected.backward()
    assert starts == ([(0, 5), (5, 5), (10, 5), (15, 5), (20, 5), (25, 5), (30, 5), (35, 5), (40, 1)] if rows else [])
    error = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for found, wanted in ((loss, expected), (mine.grad, other.grad), (own.grad, whole.grad)):
        assert (found.double() - wanted.double()).norm() <= error * wanted.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_is_torchs(dtype):
    torch.manual_seed(0)
    ours = RMSNorm(24, eps=1e-5).to(dtype)
    ours.weight.data.normal_()
    theirs = torch.nn.RMSNorm(24, eps=1e-5).double()
    theirs.weight.data.copy_(ours.weight.data)
    x, gradient = torch.randn(7, 24).to(dtype), torch.randn(7, 24).to(dtype)
    mine, other = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = ours(mine), theirs(other)
    out.backward(gradient)
    expected.backward(gradient.double())
    error = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for a, b in ((out, expected), (mine.grad, other.grad), (ours.weight.grad, theirs.weight.grad)):
        assert a.dtype == dtype and torch.allclose(a.double(), b.double(), atol=error, rtol=error)
