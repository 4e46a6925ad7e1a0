"""A stand-in for SGLang's kernel package, so that the real SGLang runs on a CPU in tests: plumbing and numbers, never speed.

PyPI has no CPU build of `sgl_kernel`, and SGLang imports these names hard. Each function does what SGLang's Triton kernel of
the same name does, in plain PyTorch. What tests do not need (cross attention, sinks) is refused, not guessed.

Legend: B requests, N tokens of all requests, D draft tokens of a request (root included), h heads, d head size.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# ---------------------------------------------------------------------------------------------------------------------
# Which cache slot a token has. req_to_token [pool, length] maps a request's row and a position to its slot.


def assign_req_to_token_pool_cpu(rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, _pool_len: int) -> None:
    """Write the new `slots`, request after request, to positions [start, end) of each request."""
    done = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[row, first:last] = slots[done : done + last - first].to(req_to_token.dtype)
        done += last - first


def assign_extend_cache_locs_cpu(rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out: Tensor, _pool_len: int) -> None:
    """Read the slots at positions [start, end) of each request into `out`, one request after the other."""
    done = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        out[done : done + last - first] = req_to_token[row, first:last].to(out.dtype)
        done += last - first


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor, req_to_token: Tensor, seq_lens: Tensor, out: Tensor, pool_len: int, topk: int, steps: int
) -> None:
    """Read the topk * steps slots that follow each request's tokens."""
    assign_extend_cache_locs_cpu(rows, req_to_token, seq_lens, seq_lens + topk * steps, out, pool_len)


def build_draft_decode_metadata_cpu(req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, topk: int, steps: int, pool_len: int) -> Tensor:
    """[B * topk, pool_len]: a table of slots for each draft branch: its request's tokens, then the branch's own steps."""
    table = torch.zeros(len(rows) * topk, pool_len, dtype=req_to_token.dtype)
    for n, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        for branch in range(topk):
            start = length + branch * steps
            table[n * topk + branch, :length] = req_to_token[row, :length]
            table[n * topk + branch, length : length + steps] = req_to_token[row, start : start + steps]
    return table


def copy_all_layer_kv_cache_cpu(pointers: Tensor, strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Copy cache slots within every layer's buffer, given as raw addresses with a slot's size in bytes."""
    to, frm = targets.numpy(), sources.numpy()
    if not len(to):
        return
    slots = int(max(to.max(), frm.max())) + 1
    for address, stride in zip(pointers.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (slots * int(stride))).from_address(address)
        buffer = np.frombuffer(memory, np.uint8).reshape(slots, int(stride))
        buffer[to] = buffer[frm]  # the right side is a copy, so overlaps do no harm


# ---------------------------------------------------------------------------------------------------------------------
# Drafts and their verification


def fill_bonus_tokens_cpu(accepted: Tensor, lengths: Tensor, out: Tensor, width: int) -> None:
    """The last accepted token of each request; `accepted` has `width` places per request."""
    places = torch.arange(len(lengths)) * width + lengths.long() - 1
    out[: len(lengths)] = accepted.flatten()[places].to(out.dtype)


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, slots: Tensor, out: Tensor) -> None:
    """Slots of the accepted tokens, in order, without the gaps (-1)."""
    kept = accept_index.flatten()
    kept = kept[kept > -1].long()
    out[: len(kept)] = slots[kept].to(out.dtype)


def build_tree_kernel_efficient_cpu(
    parents: Tensor, selected: Tensor, seq_lens: Tensor, tree_mask: Tensor, positions: Tensor,
    index: Tensor, next_token: Tensor, next_sibling: Tensor, topk: int, _depth: int, draft_tokens: int, mask_mode: int,
) -> None:  # fmt: skip
    """Links, positions and masks of each request's tree of D tokens, the root first. Everything after `selected` is written."""
    if int(mask_mode) != 1:
        raise NotImplementedError(f"tree mask mode {mask_mode}: this stand-in knows QLEN_ONLY (1), the one that SGLang uses on a CPU")
    masks = tree_mask[: len(seq_lens) * draft_tokens * draft_tokens].view(-1, draft_tokens, draft_tokens)
    for n, length in enumerate(seq_lens.tolist()):
        chosen = selected[n].tolist()
        above = [_parent(place, chosen, parents[n].tolist(), topk) for place in range(draft_tokens - 1)]  # of tokens 1, 2, ...
        index[n] = torch.arange(n * draft_tokens, (n + 1) * draft_tokens)
        for token in range(draft_tokens - 1, 0, -1):  # backwards: the first child ends up linked from the parent
            parent = above[token - 1]
            next_sibling[n, token] = next_token[n, parent]
            next_token[n, parent] = token
        masks[n] = False
        for token in range(draft_tokens):
            depth, here = 0, token
            while here:
                masks[n, token, here] = True
                depth, here = depth + 1, above[here - 1]
            masks[n, token, 0] = True
            positions[n * draft_tokens + token] = length + depth


def _parent(place: int, chosen: list[int], parents: list[int], topk: int) -> int:
    """The token that the draft at this place follows: 0 is the root, i + 1 the i-th chosen draft."""
    group = chosen[place] // topk
    return 0 if group == 0 else chosen.index(parents[group]) + 1


def verify_tree_greedy_cpu(
    predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor,
    retrive_index: Tensor, retrive_next_token: Tensor, retrive_next_sibling: Tensor, target_predict: Tensor,
) -> None:  # fmt: skip
    """Walk down each tree while a child is what the target says; note the accepted tokens and the target's next one."""
    predicted, flat = target_predict.flatten(), predicts.view(-1)
    for n in range(candidates.shape[0]):
        last = int(retrive_index[n, 0])
        accept_index[n, 0] = last
        node = accepted = 0
        for _ in range(1, accept_index.shape[1]):
            child, wanted = int(retrive_next_token[n, node]), int(predicted[last])
            while child != -1 and int(candidates[n, child]) != wanted:
                child = int(retrive_next_sibling[n, child])
            if child == -1:
                break
            flat[last] = wanted
            node, last, accepted = child, int(retrive_index[n, child]), accepted + 1
            accept_index[n, accepted] = last
        accept_token_num[n] = accepted
        flat[last] = predicted[last].to(flat.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over the cache


def extend_attention_cpu(
    q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, keys: Tensor, values: Tensor, key_scale: float, value_scale: float,
    req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, extend_lens: Tensor, extend_starts: Tensor, _max_extend: int,
    scaling: float, logit_cap: float, cross: bool, window: int, _encoder_lens: Tensor | None, sinks: Tensor | None,
    tree_mask: Tensor | None, causal: bool,
) -> None:  # fmt: skip
    """New tokens of each request attend to its tokens so far; their keys and values are in the cache already. q, out: [N, h, d]."""
    _refuse(key_scale, value_scale, logit_cap, cross, sinks)
    done = 0
    numbers = zip(rows.tolist(), seq_lens.tolist(), extend_lens.tolist(), extend_starts.tolist(), strict=True)
    for row, length, new, start in numbers:
        slots = req_to_token[row, :length].long()
        at = torch.arange(length - new, length)[:, None]  # positions of the queries
        to = torch.arange(length)[None]
        seen = to <= at if causal else torch.ones(new, length, dtype=torch.bool)
        if window > 0:
            seen &= to > at - window
        if tree_mask is not None:
            seen[:, length - new :] = tree_mask[done : done + new * new].view(new, new)
            done += new * new
        out[start : start + new] = _attend(q[start : start + new], keys[slots], values[slots], seen, scaling)


def decode_attention_cpu(
    q: Tensor, keys: Tensor, values: Tensor, key_scale: float, value_scale: float, out: Tensor, k: Tensor | None, v: Tensor | None,
    slots: Tensor, _scratch: Tensor, req_to_token: Tensor, rows: Tensor, seq_lens: Tensor,
    scaling: float, logit_cap: float, cross: bool, window: int, _encoder_lens: Tensor | None, sinks: Tensor | None,
) -> None:  # fmt: skip
    """One token of each request attends to the request's tokens, itself included; its key and value are stored first."""
    _refuse(key_scale, value_scale, logit_cap, cross, sinks)
    if k is not None and v is not None:
        keys[slots] = k.view(-1, *keys.shape[1:]).to(keys.dtype)
        values[slots] = v.view(-1, *values.shape[1:]).to(values.dtype)
    for n, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        places = req_to_token[row, :length].long()
        seen = torch.arange(length)[None] > length - 1 - window if window > 0 else torch.ones(1, length, dtype=torch.bool)
        out[n : n + 1] = _attend(q[n : n + 1], keys[places], values[places], seen, scaling)


def _attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """q [new, h, d], keys and values [length, h_kv, d], seen [new, length] -> [new, h, d]."""
    heads = (tensor.transpose(0, 1)[None] for tensor in (q, keys, values))  # [1, h, tokens, d] each
    out = scaled_dot_product_attention(*heads, attn_mask=seen[None, None], scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


def _refuse(key_scale: float, value_scale: float, logit_cap: float, cross: bool, sinks: Tensor | None) -> None:
    if key_scale != 1 or value_scale != 1 or logit_cap or cross or sinks is not None:
        raise NotImplementedError("this stand-in has no scaled caches, capped logits, cross attention or sinks")


torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
