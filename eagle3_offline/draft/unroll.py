"""Test-time training: the draft unrolled over its own states, as a server will run it (arXiv 2503.01840, section 3).

    g      = fc(aux)                                  once
    u      = embedding of x[p+1+k], g                 each normed
    g'     = finish(g, attention(u))                  logits = lm_head(norm(g')); g' (EAGLE-3.1: norm(g')) is the next step's g

A row that is dead at every step needs only its step-0 key and value: queries, MLP and logits run on live rows alone,
which changes no result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import Conversation, attend, no_own, with_own
from .batch import DraftBatch
from .model import DraftHead
from .products import shared_weights


def unroll(head: DraftHead, batch: DraftBatch, embed: Tensor, steps: int) -> list[Tensor]:
    """Logits over the draft vocabulary per step: [n_k, D] for the rows of batch.steps[k]."""
    return [head.lm_head(state) for state in unrolled_states(head, batch, embed, steps)]


def unrolled_states(head: DraftHead, batch: DraftBatch, embed: Tensor, steps: int) -> list[Tensor]:
    """What lm_head reads per step: [n_k, H] for the rows of batch.steps[k]. embed [V, H] is the frozen table."""
    layer = head.midlayer
    dtype = head.fc.weight.dtype
    g = head.features(batch.scaled.to(dtype))  # [N, H]
    of_embedding, of_state = layer.halves()
    projected = layer.project(head.embedded(batch.tokens, embed).to(dtype), of_embedding)  # row p reads p + k's at step k
    keys, values = layer.key_value(projected, g, of_state, batch.positions)  # [N, kv, d], what every step attends to
    own_keys = own_values = no_own(keys, len(keys))
    states = []
    with shared_weights(layer):
        for k in range(steps):
            kept = batch.steps[k].kept
            inputs = _at(g, kept), projected, of_state, keys, values, _at(own_keys, kept), _at(own_values, kept)
            if head.checkpoint_activations and torch.is_grad_enabled():
                state, g, own_keys, own_values = checkpoint(_step, head, batch, k, *inputs, use_reentrant=False)
            else:
                state, g, own_keys, own_values = _step(head, batch, k, *inputs)
            states.append(state)
    return states


def _step(
    head: DraftHead, batch: DraftBatch, k: int, g: Tensor, projected: Tensor, of_state: Tensor, keys: Tensor, values: Tensor,
    own_keys: Tensor, own_values: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One step of the rows that are alive: what lm_head reads, the next g, and the rows' own keys and values, this step's included.

    g [n_k, H]; projected [N, (h + 2 kv) d]; keys, values [N, kv, d]; own_keys, own_values [n_k, kv, max(0, k - 1), d] of the steps 1..k-1.
    """
    layer, step = head.midlayer, batch.steps[k]
    mixed = _at(projected, step.rows + k), g, of_state, step.positions
    if k == 0:
        query = layer.query(*mixed)
    else:
        query, key, value = layer.query_key_value(*mixed)
        own_keys, own_values = with_own(own_keys, key), with_own(own_values, value)
    conversations = [Conversation(*segment, count) for segment, count in zip(batch.segments, step.counts, strict=True)]
    attended = attend(query, step.rows, keys, values, own_keys, own_values, conversations, head.attention)
    state, g = head.outputs(layer.finish(g, attended))
    return state, g, own_keys, own_values


class _Rows(torch.autograd.Function):
    """x[rows] of rows that are all different. Their gradients are written side by side, where autograd would add one after the other."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(0, rows, gradient), None


def _at(x: Tensor, rows: Tensor) -> Tensor:
    """[n_k, ...] of x [n, ...]."""
    return _Rows.apply(x, rows)
