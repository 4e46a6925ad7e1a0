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

from .attention import Conversation, attend
from .batch import DraftBatch
from .model import DraftHead


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
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    states = []
    for k in range(steps):
        kept = batch.steps[k].kept
        inputs = g[kept], projected, of_state, keys, values, [x[kept] for x in own_keys], [x[kept] for x in own_values]
        if head.checkpoint_activations and torch.is_grad_enabled():
            state, g, own_keys, own_values = checkpoint(_step, head, batch, k, *inputs, use_reentrant=False)
        else:
            state, g, own_keys, own_values = _step(head, batch, k, *inputs)
        states.append(state)
    return states


def _step(
    head: DraftHead, batch: DraftBatch, k: int, g: Tensor, projected: Tensor, of_state: Tensor, keys: Tensor, values: Tensor,
    own_keys: list[Tensor], own_values: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """One step of the rows that are alive: what lm_head reads, the next g, and the rows' own keys and values, this step's included.

    g [n_k, H]; projected [N, (h + 2 kv) d]; keys, values [N, kv, d]; own_keys, own_values: per step 1..k-1 [n_k, kv, d].
    """
    layer, step = head.midlayer, batch.steps[k]
    mixed = projected[step.rows + k], g, of_state, step.positions
    if k == 0:
        query = layer.query(*mixed)
    else:
        query, key, value = layer.query_key_value(*mixed)
        own_keys, own_values = [*own_keys, key], [*own_values, value]
    conversations = [Conversation(*segment, count) for segment, count in zip(batch.segments, step.counts, strict=True)]
    attended = attend(query, step.rows, keys, values, own_keys, own_values, conversations, head.attention)
    state, g = head.outputs(layer.finish(g, attended))
    return state, g, own_keys, own_values
