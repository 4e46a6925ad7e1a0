"""Attention of a chain through fused kernels: the one behind scaled_dot_product_attention on a CPU, FlashAttention on a GPU.

Legend as draft/attention.py. A row's scores are s_j over step-0 keys and its own, L their log-sum-exp, P_j = exp(s_j - L) and
O = sum_j P_j v_j. Then

    dS_j = P_j (dO . v_j - dO . O),   dv_j = P_j dO

for either sort of key. So a kernel's backward pass, given L and O of all keys instead of those of the step-0 keys that it is
called with, gives these keys' share of the gradients, and neither scores nor weights are kept between the passes (the trick of
ring attention, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..machine import cpu_has_matrix_units
from .products import longer

PIECE_QUERIES = 192  # in one call of the CPU's kernel, which makes the scores of keys that its mask hides too
UNITS = (32, 64)  # of whose multiples the queries and keys of a call in bfloat16 are: it compiles products for every other number anew

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLASH = torch.ops.aten._flash_attention_forward
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward


class Kernel(Protocol):
    """Attention over the step-0 keys: query [n, h, d], keys and values [T, kv, d]."""

    widens: bool  # whether its backward pass is called with fp32 or wider

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Output [n, h, d], and the log-sum-exp [n, h] of the scores in fp32 or wider."""

    def backward(self, gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
        """Gradients of query, keys and values; `gradient` [n, h, d] is that of `out`, over more keys, whose log-sum-exp is log_sum."""


class Group(NamedTuple):
    """Conversations that attend in one call."""

    queries: slice
    keys: slice  # their step-0 rows
    rows: Tensor  # [queries] each query's row among these
    begins: Tensor | None  # [queries] the first row of its conversation among these; None: they are one


def hidden(rows: Tensor, length: int, begins: Tensor | None) -> Tensor:
    """[n, T] bool: which of T step-0 keys the rows [n] of conversations that begin at `begins` [n] (None: at 0) do not see."""
    places = torch.arange(length, device=rows.device)
    future = places > rows[:, None]
    return future if begins is None else future | (places < begins[:, None])  # other conversations


class MaskedKernel:
    """The CPU's, which takes any mask. In bfloat16 only its forward pass is faster, and only with matrix units."""

    widens = True

    def __init__(self, groups: list[Group]):
        """groups: of all queries, each in the order of its rows."""
        self.pieces = [piece for group in groups for piece in _pieces(group)]

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        narrow = query.dtype == torch.bfloat16 and cpu_has_matrix_units()
        query, keys, values = (query, keys, values) if narrow else _widened(query, keys, values)
        of_queries, of_keys = UNITS if narrow else (1, 1)
        out, log_sum = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=wide(query))
        query, keys, values = longer(query, of_queries - 1), longer(keys, of_keys - 1), longer(values, of_keys - 1)
        for piece in self.pieces:
            mine, seen = _in_units(piece.queries, of_queries), _in_units(piece.keys, of_keys)
            found = _CPU(*_heads_first(query[mine], keys[seen], values[seen]), attn_mask=_bias(piece, query, mine, seen), scale=1.0)
            out[piece.queries], log_sum[piece.queries] = (y[0].transpose(0, 1)[: len(piece.rows)] for y in found)
        return out, log_sum

    def backward(self, gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for piece in self.pieces:
            mine, seen = piece.queries, piece.keys
            x = _heads_first(gradient[mine], query[mine], keys[seen], values[seen], out[mine], log_sum[mine])
            found = _CPU_BACKWARD(*x, 0.0, False, attn_mask=_bias(piece, query, mine, seen), scale=1.0)
            of_query, of_keys, of_values = (y[0].transpose(0, 1) for y in found)
            dq[mine] = of_query
            dk[seen] += of_keys
            dv[seen] += of_values
        return dq, dk, dv


def _in_units(rows: slice, unit: int) -> slice:
    """These rows, and as many behind them as make a multiple of `unit`."""
    return slice(rows.start, rows.start + -(-(rows.stop - rows.start) // unit) * unit)


def _pieces(group: Group) -> Iterator[Group]:
    """A group's queries in pieces of about one size, each with those keys alone that lie between the first and the last that it sees."""
    count = len(group.rows)
    number = -(-count // PIECE_QUERIES)
    for i in range(number):
        mine = slice(count * i // number, count * (i + 1) // number)
        rows, begins = group.rows[mine], None if group.begins is None else group.begins[mine]
        first = 0 if begins is None else int(begins[0])
        queries = slice(group.queries.start + mine.start, group.queries.start + mine.stop)
        keys = slice(group.keys.start + first, group.keys.start + int(rows[-1]) + 1)
        yield Group(queries, keys, rows - first, None if begins is None else begins - first)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[1, heads, rows, ...] of each [rows, heads, ...]."""
    return [x.transpose(0, 1)[None] for x in tensors]


def _bias(group: Group, like: Tensor, queries: slice, keys: slice) -> Tensor:
    """[n, T] what is added to scores in a call with these queries and keys: the group's, and perhaps more behind them."""
    bias = like.new_zeros(queries.stop - queries.start, keys.stop - keys.start)
    bias[: len(group.rows)].masked_fill_(hidden(group.rows, bias.shape[1], group.begins), float("-inf"))
    return bias


class FlashKernel:
    """FlashAttention as torch brings it, in bfloat16, all conversations in one call.

    Its causal mask knows no gaps between rows. So a row without a query gets one of zeros, and in the backward pass zeros for its
    gradient, output and log-sum-exp, which keeps its weights finite: it adds nothing to any other's.
    """

    widens = False

    def __init__(self, rows: Tensor, bounds: list[int]):
        """rows [n] of the queries among the step-0 rows; bounds: where each conversation starts, and the end of the last, which leave
        no row out."""
        self.rows = rows
        self.bounds = torch.tensor(bounds, dtype=torch.int32, device=rows.device)
        self.longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, log_sum, *_ = _FLASH(self._spread(query, keys), keys, values, *self._ranges(), return_debug_mask=False, scale=1.0)
        return out[self.rows], log_sum.T[self.rows]

    def backward(self, gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
        gradient, query, out, log_sum = (self._spread(x, keys) for x in (gradient, query, out, log_sum))
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        dq, dk, dv = _FLASH_BACKWARD(
            gradient, query, keys, values, out, log_sum.T.contiguous(), *self._ranges(), *no_dropout, scale=1.0
        )  # fmt: skip
        return dq[self.rows], dk, dv

    def _ranges(self) -> tuple[Tensor, Tensor, int, int, float, bool]:
        """Of queries and keys, the longest of either, dropout, causal."""
        return self.bounds, self.bounds, self.longest, self.longest, 0.0, True

    def _spread(self, x: Tensor, keys: Tensor) -> Tensor:
        """[T, ...] of [n, ...]: zeros in between."""
        return x.new_zeros(len(keys), *x.shape[1:]).index_copy_(0, self.rows, x)


def fused(kernel: Kernel, query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor) -> Tensor:
    """[n, h, d] of scaled queries [n, h, d]; own_keys, own_values [n, kv, k, d]."""
    return _ChainAttention.apply(kernel, query, keys, values, own_keys, own_values) if len(query) else query


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Kernel, *given: Tensor) -> Tensor:  # noqa: ANN001
        query, keys, values, own_keys, own_values = given
        out, total = kernel.forward(query, keys, values)
        if own_keys.shape[2]:
            query, out, own_keys, own_values = _widened(by_head(query, keys), by_head(out, keys), own_keys, own_values)
            scores, log_sum = query @ own_keys.mT, by_head(total[..., None], keys)  # [n, kv, g, k], [n, kv, g, 1]
            total = torch.logaddexp(log_sum, scores.logsumexp(-1, keepdim=True))
            out = out * (log_sum - total).exp() + (scores - total).exp() @ own_values
            out, total = out.flatten(1, 2), total.flatten(1)
        out = out.to(given[0].dtype)
        ctx.kernel = kernel
        ctx.save_for_backward(*given, out, total)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        *given, out, total = ctx.saved_tensors
        tensors = gradient, *given, out
        gradient, query, keys, values, own_keys, own_values, out = _widened(*tensors) if ctx.kernel.widens else tensors
        dq, dk, dv = ctx.kernel.backward(gradient, query, keys, values, out, total)
        own_dk = own_dv = None
        if own_keys.shape[2]:
            query, gradient, out = (by_head(x, keys) for x in (query, gradient, out))  # [n, kv, g, d]
            query, gradient, out, own_keys, own_values = _widened(query, gradient, out, own_keys, own_values)
            weights = (query @ own_keys.mT - by_head(total[..., None], keys)).exp()  # [n, kv, g, k]
            ds = weights * (gradient @ own_values.mT - (gradient * out).sum(-1, keepdim=True))
            dq = dq + (ds @ own_keys).flatten(1, 2)
            own_dk, own_dv = ds.mT @ query, weights.mT @ gradient
        found = dq, dk, dv, own_dk, own_dv
        return None, *(None if x is None else x.to(given[0].dtype) for x in found)


def by_head(x: Tensor, keys: Tensor) -> Tensor:
    """[n, kv, g, ...] of [n, h, ...]: queries by the key/value head that they read."""
    return x.unflatten(1, (keys.shape[1], -1))


def _widened(*tensors: Tensor) -> list[Tensor]:
    """In fp32 or wider: a score rounded to bfloat16 is off by some per cent of its weight, and a CPU compiles such products for each n."""
    return [x.to(wide(x)) for x in tensors]


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums of such values are made: fp32, or wider."""
    return torch.promote_types(x.dtype, torch.float32)
