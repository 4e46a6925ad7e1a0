"""Attention of a chain through the kernel behind scaled_dot_product_attention on a CPU. Legend as draft/attention.py.

A row's scores are s_j over step-0 keys and its own, L their log-sum-exp, P_j = exp(s_j - L) and O = sum_j P_j v_j. Then

    dS_j = P_j (dO . v_j - dO . O),   dv_j = P_j dO

for either sort of key. So the kernel's backward pass, given L and O of all keys instead of those of the step-0 keys that it is
called with, gives these keys' share of the gradients, and neither scores nor weights are kept between the passes (the trick of
ring attention, arXiv 2310.01889).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import UserError

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sdpa(query: Tensor, hidden: Tensor, keys: Tensor, values: Tensor, own_keys: list[Tensor], own_values: list[Tensor]) -> Tensor:
    """[n, h, d] of scaled queries [n, h, d]. hidden [n, T] bool: step-0 keys that a row does not see; it sees one at least."""
    if query.device.type != "cpu":
        raise UserError(f"train.attention is sdpa, whose kernel is a CPU's, and the draft is on {query.device}: leave it at auto")
    return _ChainAttention.apply(query, hidden, keys, values, *own_keys, *own_values) if len(query) else query


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, hidden: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:  # noqa: ANN001
        out, log_sum = _KERNEL(*_heads_first(query, keys, values), attn_mask=_bias(hidden, query), scale=1.0)
        out = out.to(query.dtype)
        kv = keys.shape[1]
        out, total = out[0].transpose(0, 1).unflatten(1, (kv, -1)), log_sum[0].T.unflatten(1, (kv, -1))  # [n, kv, g, d], [n, kv, g]
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        if own:
            log_sum, scores = total, [_dot(query.unflatten(1, (kv, -1)), key[:, :, None]) for key in own_keys]
            total = torch.stack((log_sum, *scores)).logsumexp(0)
            out = out * _weight(log_sum, total, out)
            for score, value in zip(scores, own_values, strict=True):
                out.addcmul_(_weight(score, total, out), value[:, :, None])
        ctx.save_for_backward(query, hidden, keys, values, out, total, *own)
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        query, hidden, keys, values, out, total, *own = ctx.saved_tensors
        whole = _heads_first(out.flatten(1, 2), total.flatten(1, 2))  # [1, h, n, d], [1, h, n]
        dq, dk, dv = _BACKWARD(*_heads_first(gradient, query, keys, values), *whole, 0.0, False,
                               attn_mask=_bias(hidden, query), scale=1.0)  # fmt: skip
        dq, dk, dv = (x[0].transpose(0, 1).to(query.dtype) for x in (dq, dk, dv))
        query, gradient, dq = (x.unflatten(1, (keys.shape[1], -1)) for x in (query, gradient, dq))  # [n, kv, g, d]
        shared = _dot(gradient, out)  # [n, kv, g]: dO . O
        own_dk, own_dv = [], []
        for key, value in zip(own[: len(own) // 2], own[len(own) // 2 :], strict=True):
            key, value = key[:, :, None], value[:, :, None]
            weight = (_dot(query, key) - total).exp()
            ds = (weight * (_dot(gradient, value) - shared))[..., None].to(query.dtype)
            dq = dq + ds * key
            own_dk.append((ds * query).sum(2))
            own_dv.append((weight[..., None].to(query.dtype) * gradient).sum(2))
        return dq.flatten(1, 2), None, dk, dv, *own_dk, *own_dv


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[1, heads, rows, d] of each [rows, heads, d], in fp32 or wider."""
    return [x.transpose(0, 1)[None].to(wide(x)) for x in tensors]


def _bias(hidden: Tensor, like: Tensor) -> Tensor:
    """[n, T] what is added to scores."""
    return torch.zeros(hidden.shape, dtype=wide(like), device=hidden.device).masked_fill_(hidden, float("-inf"))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Over the last dimension, in fp32 or wider."""
    return (a * b).sum(-1, dtype=wide(a))


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums of such values are made: fp32, or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _weight(score: Tensor, total: Tensor, like: Tensor) -> Tensor:
    return (score - total).exp()[..., None].to(like.dtype)
