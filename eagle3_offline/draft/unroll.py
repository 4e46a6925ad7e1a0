"""Test-time training: the draft unrolled over its own states, as a server will run it (arXiv 2503.01840, section 3).

    g      = fc(aux)                                  once
    u      = mix(embedding of x[p+1+k], g)
    g'     = finish(g, attention(u))                  logits = lm_head(norm(g')); g' (EAGLE-3.1: norm(g')) is the next step's g

A row that is dead at every step needs only its step-0 key and value: queries, MLP and logits run on live rows alone,
which changes no result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attend
from .batch import DraftBatch, StepRows
from .model import DraftHead

GROUP_ROWS = 512


def unroll(head: DraftHead, batch: DraftBatch, embed: Tensor, steps: int) -> list[Tensor]:
    """Logits over the draft vocabulary per step: [n_k, D] for the rows of batch.steps[k]."""
    return [head.lm_head(state) for state in unrolled_states(head, batch, embed, steps)]


def unrolled_states(head: DraftHead, batch: DraftBatch, embed: Tensor, steps: int) -> list[Tensor]:
    """What lm_head reads per step: [n_k, H] for the rows of batch.steps[k]. embed [V, H] is the frozen table."""
    layer = head.midlayer
    dtype = head.fc.weight.dtype
    g = head.features(batch.aux.to(dtype))  # [N, H]
    embedded = head.embedded(batch.tokens, embed).to(dtype)
    normed = layer.input_layernorm(embedded)  # [N, H]; what a row reads at step k is what row p + k reads at step 0
    u = layer.mix(normed, g)
    keys, values = layer.key_value(u, batch.positions)  # [N, kv, d], what every step attends to
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    states = []
    for k in range(steps):
        step = batch.steps[k]
        g = g[step.kept]
        if k:
            own_keys, own_values = [x[step.kept] for x in own_keys], [x[step.kept] for x in own_values]
            u = layer.mix(normed[step.rows + k], g)
            key, value = layer.key_value(u, step.positions)
            own_keys, own_values = [*own_keys, key], [*own_values, value]
        else:
            u = u[step.kept]
        attended = _attend_groups(layer.query(u, step.positions), step, batch, keys, values, own_keys, own_values)
        state, g = head.outputs(layer.finish(g, attended))
        states.append(state)
    return states


def _attend_groups(
    query: Tensor, step: StepRows, batch: DraftBatch, keys: Tensor, values: Tensor, own_keys: list[Tensor], own_values: list[Tensor]
) -> Tensor:
    """Attention of each conversation over its own rows, short ones several at a time. Returns [n_k, h, d]."""
    pieces, first = [], 0
    for start, stop, conversations in groups(batch.segments):
        count = sum(step.counts[c] for c in conversations)
        mine = slice(first, first + count)
        begins = torch.tensor([batch.segments[c][0] for c in conversations], device=query.device)
        counts = torch.tensor([step.counts[c] for c in conversations], device=query.device)
        pieces.append(
            attend(query[mine], step.rows[mine] - start, keys[start:stop], values[start:stop],
                   [x[mine] for x in own_keys], [x[mine] for x in own_values],
                   (begins - start).repeat_interleave(counts) if len(conversations) > 1 else None)
        )  # fmt: skip
        first += count
    return torch.cat(pieces)


def groups(segments: tuple[tuple[int, int], ...]) -> list[tuple[int, int, list[int]]]:
    """(first row, end, conversations) of neighbours that attend in one call: a masked product of a few hundred rows costs less than
    the calls that it saves."""
    found: list[tuple[int, int, list[int]]] = []
    for number, (start, stop) in enumerate(segments):
        if found and stop - found[-1][0] <= GROUP_ROWS:
            found[-1] = (found[-1][0], stop, [*found[-1][2], number])
        else:
            found.append((start, stop, [number]))
    return found
