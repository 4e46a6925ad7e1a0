"""Attention of a chain: one softmax over the step-0 keys j <= p of the row's own conversation, plus the row's own later keys.

Legend: n query rows, T step-0 rows of the conversation, k later steps, h heads, kv key/value heads, d head dim.

    conversation rows   0 1 2 3 4        row p = 2 at step 2 sees the keys
    step-0 keys         a b c d e            a b c          (causal over step 0)
    its own keys        c' (step 1), c'' (step 2)    c' c'' (the diagonal: never those of other rows)

At serving the keys of drafted positions are thrown away after each verification and recomputed from the target's true
features, so that earlier rows are seen as step-0 keys only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
    begins: Tensor | None = None,
) -> Tensor:
    """Attention of one conversation, or with `begins` of several side by side. Returns [n, h, d].

    query [n, h, d] of the rows `rows` [n] (indices into the conversation's step-0 rows); keys, values [T, kv, d];
    own_keys, own_values: per later step 1..k the rows' own [n, kv, d]. begins [n]: first row of each row's conversation.
    """
    n, heads, dim = query.shape
    groups = heads // keys.shape[1]
    query = (query * dim**-0.5).unflatten(1, (-1, groups))  # [n, kv, g, d]
    scores = torch.einsum("nkgd,tkd->nkgt", query, keys)
    places = torch.arange(len(keys), device=rows.device)
    hidden = places > rows[:, None]  # [n, T]: the future
    if begins is not None:
        hidden |= places < begins[:, None]  # other conversations
    scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    if own_keys:
        own = torch.stack([(query * key[:, :, None]).sum(-1) for key in own_keys], dim=-1)  # [n, kv, g, k]
        scores = torch.cat((scores, own), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype == torch.bfloat16 else None).to(values.dtype)
    out = torch.einsum("nkgt,tkd->nkgd", weights[..., : len(keys)], values)
    for step, value in enumerate(own_values):
        out = out + weights[..., len(keys) + step, None] * value[:, :, None]
    return out.flatten(1, 2)  # [n, h, d]
