"""Products x W^T of rows x [n, in] with weights [out, in], where n is another in every batch and at every step of the unroll.

On a CPU oneDNN compiles each bfloat16 product anew for each n, forward, backward and for the weight's gradient: a few milliseconds
each, more than the product itself takes where the processor has matrix units. So rows of zeros fill n up to one of a few counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    if not _compiled(x):
        return x
    missing = round_up(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class _FilledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN001
        rows = filled(x)
        ctx.save_for_backward(rows, weight)
        return (rows @ weight.T)[: len(x)]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN001
        rows, weight = ctx.saved_tensors
        count, gradient = len(gradient), filled(gradient)
        of_x = (gradient @ weight)[:count] if ctx.needs_input_grad[0] else None
        return of_x, gradient.T @ rows if ctx.needs_input_grad[1] else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [n, out] of x [n, in] and weight [out, in]."""
    return _FilledLinear.apply(x, weight) if _compiled(x) else F.linear(x, weight)


class Linear(nn.Linear):
    """Without a bias, by `linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
