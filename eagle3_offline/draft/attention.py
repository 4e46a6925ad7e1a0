"""Attention of a chain: one softmax over the step-0 keys j <= p of the row's own conversation, plus the row's own later keys.

Legend: n query rows, T step-0 rows, k later steps, h heads, kv key/value heads, g = h / kv, d head dim, b rows of a block.

    conversation rows   0 1 2 3 4        row p = 2 at step 2 sees the keys
    step-0 keys         a b c d e            a b c          (causal over step 0)
    its own keys        c' (step 1), c'' (step 2)    c' c'' (the diagonal: never those of other rows)

At serving the keys of drafted positions are thrown away after each verification and recomputed from the target's true
features, so that earlier rows are seen as step-0 keys only.

Backends:

    reference   scores [n, T + k] of a conversation, one softmax over all
    blockwise   the part of the step-0 keys in blocks of rows, made again in the backward pass: no [n, T] stays in memory
    flex        that part by torch's flex_attention, a fused kernel on a GPU; on a CPU it has no gradient and is slow
    sdpa        that part by a fused kernel on a CPU, draft/fused.py
    flash       that part by FlashAttention on a GPU, in bfloat16, draft/fused.py

All but the first have the step-0 part with the log-sum-exp of its scores, by which it is weighed against the own keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from ..records import UserError
from .fused import FlashKernel, Group, MaskedKernel, by_head, fused, hidden, wide

AUTO_SCORES = 2**18  # n x T of a conversation beyond which `auto` goes by blocks on a GPU
GROUP_ROWS = 512  # step-0 rows up to which neighbours attend in one call
BLOCK_SCORES = {"cpu": 2**21, "cuda": 2**25}  # h x b x T of a block
DEVICES = {"sdpa": "cpu", "flash": "cuda"}  # backends of one sort of device


class Conversation(NamedTuple):
    """Which of a batch's rows are one conversation. Those of a batch leave no row out, and no query."""

    start: int  # its step-0 rows are start .. stop
    stop: int
    count: int  # its query rows, which follow those of the conversations before it


def attend(
    query: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    conversations: list[Conversation] | None = None,
    backend: str = "reference",
) -> Tensor:
    """Attention of a batch's conversations, each within itself. Returns [n, h, d].

    query [n, h, d] of the rows `rows` [n], indices into the step-0 rows, ascending within a conversation; keys, values [T, kv, d];
    own_keys, own_values [n, kv, k, d]: the rows' own of the later steps 1..k. No conversations: all rows are one.
    auto: sdpa on a CPU; elsewhere the reference, or by blocks where a conversation is long.
    """
    if backend == "auto" and query.device.type == "cpu":
        backend = "sdpa"
    _check_kernel(backend, query)
    conversations = conversations or [Conversation(0, len(keys), len(query))]
    query = query * query.shape[-1] ** -0.5
    if backend == "flex":
        return _merged(*_step_zero_flex(query, rows, keys, values, conversations), query, own_keys, own_values)
    if backend == "flash":
        bounds = [c.start for c in conversations] + [conversations[-1].stop]
        return fused(FlashKernel(rows, bounds), query, keys, values, own_keys, own_values)
    groups = _groups(conversations, rows, backend)
    if backend == "sdpa":
        return fused(MaskedKernel([group for group, _ in groups]), query, keys, values, own_keys, own_values)
    pieces = []
    for group, by_blocks in groups:
        one = query[group.queries], group.rows, keys[group.keys], values[group.keys]
        own = own_keys[group.queries], own_values[group.queries]
        if by_blocks:
            pieces.append(_merged(*_step_zero_blockwise(*one), one[0], *own))
        else:
            pieces.append(_reference(*one, *own, group.begins))
    return torch.cat(pieces)


def _check_kernel(backend: str, query: Tensor) -> None:
    """That a fused kernel can do these queries [n, h, d]."""
    found, demands = None, {"sdpa": "a CPU", "flash": "a GPU, bfloat16, and a head_dim that 8 divides, up to 256"}
    if query.device.type != DEVICES.get(backend, query.device.type):
        found = f"the draft is on {query.device}"
    elif backend == "flash" and (query.dtype != torch.bfloat16 or query.shape[-1] % 8 or query.shape[-1] > 256):
        found = f"the draft is in {query.dtype} with a head_dim of {query.shape[-1]}"
    if found:
        raise UserError(f"train.attention is {backend}, which needs {demands[backend]}, and {found}: leave it at auto")


def no_own(keys: Tensor, count: int) -> Tensor:
    """[count, kv, 0, d]: the own keys (or values) of rows at step 0, beside keys (or values) [T, kv, d]."""
    return keys.new_zeros(count, keys.shape[1], 0, keys.shape[2])


def with_own(own: Tensor, new: Tensor) -> Tensor:
    """[n, kv, k + 1, d]: those of the steps before [n, kv, k, d], and this one's [n, kv, d]."""
    return torch.cat((own, new[:, :, None]), dim=2)


def _by_blocks(conversation: Conversation, backend: str) -> bool:
    scores = conversation.count * (conversation.stop - conversation.start)
    return backend == "blockwise" or (backend == "auto" and scores > AUTO_SCORES)


def _neighbours(conversations: list[Conversation], backend: str) -> list[list[Conversation]]:
    """Short neighbours together: a masked product of a few hundred rows takes less than the calls that it saves."""
    groups: list[list[Conversation]] = []
    for conversation in conversations:
        alone = _by_blocks(conversation, backend) or (groups and _by_blocks(groups[-1][-1], backend))
        if groups and not alone and conversation.stop - groups[-1][0].start <= GROUP_ROWS:
            groups[-1].append(conversation)
        else:
            groups.append([conversation])
    return groups


def _groups(conversations: list[Conversation], rows: Tensor, backend: str) -> Iterator[tuple[Group, bool]]:
    """The groups, and whether each goes by blocks."""
    first = 0
    for group in _neighbours(conversations, backend):
        start, stop, count = group[0].start, group[-1].stop, sum(c.count for c in group)
        queries = slice(first, first + count)
        first += count
        begins = _begins(group, rows.device) - start if len(group) > 1 else None
        yield Group(queries, slice(start, stop), rows[queries] - start, begins), _by_blocks(group[0], backend)


def _begins(conversations: list[Conversation], device: torch.device) -> Tensor:
    """[n]: the first step-0 row of each query row's conversation."""
    counts = torch.tensor([c.count for c in conversations], device=device)
    return torch.tensor([c.start for c in conversations], device=device).repeat_interleave(counts)


# ---------------------------------------------------------------------------------------------------------------------
# One softmax over everything


def _reference(
    query: Tensor, rows: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, begins: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One conversation, or several of which each query row's begins at the key `begins` [n]."""
    grouped, scores = _step_zero_scores(query, rows, keys, begins)
    scores = torch.cat((scores, grouped @ own_keys.mT), dim=-1)  # [n, kv, g, T + k]
    weights = scores.softmax(-1, dtype=wide(scores)).to(values.dtype)
    out = torch.einsum("nkgt,tkd->nkgd", weights[..., : len(keys)], values) + weights[..., len(keys) :] @ own_values
    return out.flatten(1, 2)  # [n, h, d]


def _step_zero_scores(query: Tensor, rows: Tensor, keys: Tensor, begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scaled queries [n, h, d] by key/value head [n, kv, g, d], and their scores [n, kv, g, T], -inf where they see no key."""
    grouped = by_head(query, keys)
    scores = torch.einsum("nkgd,tkd->nkgt", grouped, keys)
    return grouped, scores.masked_fill(hidden(rows, len(keys), begins)[:, None, None, :], float("-inf"))


# ---------------------------------------------------------------------------------------------------------------------
# The step-0 part with its log-sum-exp, and the own keys merged into it


def _merged(out: Tensor, log_sum: Tensor, query: Tensor, own_keys: Tensor, own_values: Tensor) -> Tensor:
    """[n, h, d] of the step-0 part's output [n, h, d], the log-sum-exp [n, h] of its scores, and the own keys and values."""
    dtype, grouped, out = log_sum.dtype, by_head(query, own_keys), by_head(out, own_keys)  # [n, kv, g, d]
    own = grouped.to(dtype) @ own_keys.to(dtype).mT  # [n, kv, g, k]
    weights = torch.cat((by_head(log_sum[..., None], own_keys), own), dim=-1).softmax(-1).to(out.dtype)  # [n, kv, g, 1 + k]
    return (weights[..., :1] * out + weights[..., 1:] @ own_values).flatten(1, 2)


def _step_zero_blockwise(query: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output [n, h, d] and log-sum-exp [n, h] of one conversation."""
    if not len(query):
        return query, query.new_zeros(query.shape[:2], dtype=wide(query))
    size = max(1, BLOCK_SCORES[query.device.type] // (query.shape[1] * len(keys)))
    ends = rows[size - 1 :: size].tolist() + rows[-1:].tolist()  # the last row of each block
    blocks = [
        checkpoint(_step_zero_block, query[i : i + size], rows[i : i + size], keys[: end + 1], values[: end + 1], use_reentrant=False)
        for i, end in zip(range(0, len(query), size), ends, strict=False)
    ]
    return tuple(map(torch.cat, zip(*blocks, strict=True)))


def _step_zero_block(query: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    _, scores = _step_zero_scores(query, rows, keys)
    scores = scores.to(wide(scores))
    log_sum = scores.logsumexp(-1)  # [b, kv, g]
    weights = (scores - log_sum[..., None]).exp().to(values.dtype)
    return torch.einsum("nkgt,tkd->nkgd", weights, values).flatten(1, 2), log_sum.flatten(1, 2)


def _step_zero_flex(query: Tensor, rows: Tensor, keys: Tensor, values: Tensor, conversations: list[Conversation]) -> tuple[Tensor, Tensor]:
    """Output [n, h, d] and log-sum-exp [n, h] of all conversations in one call."""
    begins = _begins(conversations, rows.device)

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= begins[row]) & (key <= rows[row])

    mask = create_block_mask(sees, None, None, len(query), len(keys), device=query.device)
    one = [x.transpose(0, 1)[None] for x in (query, keys, values)]  # [1, h or kv, n or T, d]
    out, aux = _flex(query.is_cuda)(*one, block_mask=mask, scale=1.0, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].T


@cache
def _flex(compiled: bool):  # noqa: ANN202
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
