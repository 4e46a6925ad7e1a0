"""Products x W^T of rows x [n, in] with weights [out, in], where n is another in every batch and at every step of the unroll.

On a CPU oneDNN compiles each bfloat16 product anew for each n, forward, backward and for the weight's gradient: a few milliseconds
each, more than the product itself takes where the processor has matrix units. So rows of zeros fill n up to one of a few counts.
Of two threads it uses one alone where n is middling and the result narrow; of four or eight it uses all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..machine import cpu_multiplies_bfloat16

LONE_ROWS, LONE_COLUMNS = range(640, 1536), 1024  # of results that oneDNN gives to one thread of two; found by measuring
BITS = 3  # of a count that may be other than 0: at most a quarter of the rows is filled in


def round_up(count: int) -> int:
    """The next number of BITS significant bits."""
    unit = 1 << max(0, count.bit_length() - BITS)
    return -(-count // unit) * unit


def _compiled(x: Tensor) -> bool:
    """Whether products of x are compiled for their shape."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def filled(x: Tensor) -> Tensor:
    """x [n, m] itself where its shape costs nothing, else with rows of zeros up to a rounded count."""
    return longer(x, round_up(len(x)) - len(x)) if _compiled(x) else x


def longer(x: Tensor, count: int) -> Tensor:
    """x [n, ...] with `count` rows of zeros behind."""
    return torch.cat((x, x.new_zeros(count, *x.shape[1:]))) if count else x


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y [n, m] of x [n, k] and y [k, m]: in two calls where one would leave one of two threads idle."""
    n, m = len(x), y.shape[1]
    if not (_compiled(x) and torch.get_num_threads() == 2 and n in LONE_ROWS and m <= LONE_COLUMNS):
        return x @ y
    result = x.new_empty(n, m)
    for rows, part in zip(x.chunk(2), result.chunk(2), strict=True):
        torch.mm(rows, y, out=part)
    return result


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [n, out] in fp32 of bfloat16 rows x [n, in] and a weight [out, in] in fp32 whose values are bfloat16's.

    Products of such values are exact in fp32, in which they are summed either way; bfloat16's instructions take a third of the time.
    They are a setting of the whole process: none of its other threads may multiply meanwhile, and none does.
    """
    if x.device.type != "cpu" or not cpu_multiplies_bfloat16():
        return x.float() @ weight.T
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        return (filled(x).float() @ weight.T)[: len(x)]
    finally:
        settings.fp32_precision = before


def weight_gradient(gradient: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
    """gradient^T x [out, in] of the gradient [n, out] of x W^T and x [n, in]; added to `total`, in place, where one is given.

    On a CPU a product takes up to twice the time where its first operand is transposed. So where one of the two is much narrower, it is
    turned before; where that is x, the result is the transpose of a tensor in its usual layout: see `laid_out`.
    """
    first, second, flipped = gradient.T, x, False
    if _compiled(x) and gradient.shape[1] >= 2 * x.shape[1]:
        first, second, flipped = _turned(x), gradient, True
    elif _compiled(x) and x.shape[1] >= 2 * gradient.shape[1]:
        first = _turned(gradient)
    if total is not None:
        (total.T if flipped else total).addmm_(first, second)
        return total
    result = first @ second
    return result.T if flipped else result


def laid_out(gradient: Tensor) -> Tensor:
    """What `weight_gradient` has made, row by row in memory."""
    return gradient if gradient.is_contiguous() else _turned(gradient.T)


def _turned(x: Tensor) -> Tensor:
    """x^T [m, n], written row by row. By parts of x that stay in the caches."""
    return torch.cat([part.T for part in x.split(64)], dim=1)


class _Summed(torch.autograd.Function):
    """A weight that several products read. Each adds its share to `total`, where autograd would add whole gradients one after the other."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:  # noqa: ANN001
        ctx.set_materialize_grads(False)
        ctx.total = None
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, of_others: Tensor | None) -> Tensor | None:  # noqa: ANN001
        """of_others: the gradient of whatever else read it."""
        total, ctx.total = ctx.total, None
        if total is None:
            return of_others
        total = laid_out(total)
        return total if of_others is None else total.add_(of_others)


def summed(weight: Tensor) -> Tensor:
    """The weight [out, in] for the products of one graph. Each backward pass must reach it: a total that is left is added to the next."""
    return _Summed.apply(weight) if _compiled(weight) else weight


class _FilledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN001
        rows = filled(x)
        ctx.summed_by = weight.grad_fn if hasattr(weight.grad_fn, "total") else None  # the node that `summed` has made
        ctx.save_for_backward(rows, weight)
        return product(rows, weight.T)[: len(x)]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN001
        rows, weight = ctx.saved_tensors
        count, gradient = len(gradient), filled(gradient)
        of_x = product(gradient, weight)[:count] if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None
        if ctx.summed_by is None:
            return of_x, laid_out(weight_gradient(gradient, rows))
        ctx.summed_by.total = weight_gradient(gradient, rows, ctx.summed_by.total)
        return of_x, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [n, out] of x [n, in] and weight [out, in]."""
    return _FilledLinear.apply(x, weight) if _compiled(x) else F.linear(x, weight)


class Linear(nn.Linear):
    """Without a bias, by `linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.shared: Tensor | None = None  # its weight, within `shared_weights`

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.shared is None else self.shared)


@contextmanager
def shared_weights(module: nn.Module) -> Iterator[None]:
    """For a forward pass that calls the module several times: the gradients of its weights are `summed`."""
    ours = [layer for layer in module.modules() if isinstance(layer, Linear) and _compiled(layer.weight)]
    layers = [layer for layer in ours if not hasattr(layer.weight, "ds_id")]  # ZeRO-3 gathers a weight anew for every call
    try:
        for layer in layers:
            layer.shared = summed(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.shared = None
