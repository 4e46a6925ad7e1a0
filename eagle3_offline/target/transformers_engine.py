"""The embedded engine, and the reference for the others: Hugging Face transformers in this process.

Legend: B rows of a batch, P padded length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..machine import cpu_multiplies_bfloat16
from ..records import UserError
from .engine import Asked, Completion, Reduced, Request, Sampling, States
from .reduction import Reducer, to_storage


class TransformersEngine:
    """Batched decoding and prefill capture with a left- or right-padded batch."""

    name = "transformers"
    version = transformers.__version__
    longest_row = None

    def __init__(self, folder: Path, layers: tuple[int, ...], dtype: str, trust_remote_code: bool = False, reducer: Reducer | None = None):
        """folder: a Hugging Face folder; dtype: of the states, a key of records.STORAGE_DTYPE; reducer: for `reduced_batches`.

        The target runs in this dtype, but in fp32 on a processor that would emulate bfloat16, which takes six times as long there.
        """
        transformers.utils.logging.disable_progress_bar()  # the stages show their own
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        emulated = dtype == "bfloat16" and self.device.type == "cpu" and not cpu_multiplies_bfloat16()
        computed = torch.float32 if emulated else getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=computed, trust_remote_code=trust_remote_code)
        if model.config._attn_implementation == "sdpa":
            use_grouped_attention(model)
        self.model = model.eval().to(self.device)
        self.layers = layers
        self.dtype = dtype
        self.reducer = reducer and reducer.on(self.device)
        self.end_ids = end_of_turn_ids(folder)

    # -- generation

    @torch.inference_mode()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        answers: list[list[int]] = [[] for _ in requests]
        draws = [torch.Generator().manual_seed(sampling.seed_of(request.id)) for request in requests]
        lengths = torch.tensor([len(request.prompt) for request in requests])
        mask = torch.arange(int(lengths.max()))[None] >= lengths.max() - lengths[:, None]  # [B, P], left-padded
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([token for request in requests for token in request.prompt])
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache, alive = DynamicCache(), list(range(len(requests)))
        while alive:
            out = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device), position_ids=positions.to(self.device),
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            tokens = _draw(out.logits[:, -1].float().cpu(), sampling, [draws[i] for i in alive])  # [B]
            for i, token in zip(alive, tokens, strict=True):
                answers[i].append(token)
            going = [n for n, i in enumerate(alive) if answers[i][-1] not in self.end_ids and len(answers[i]) < requests[i].max_tokens]
            if len(going) < len(alive) and going:
                cache.batch_select_indices(torch.tensor(going, device=self.device))
            alive = [alive[n] for n in going]
            ids = torch.tensor([[tokens[n]] for n in going])
            positions = positions[going, -1:] + 1
            mask = torch.cat((mask[going], torch.ones(len(going), 1, dtype=torch.bool)), dim=1)
        return [Completion(answer, "stop" if answer[-1] in self.end_ids else "length") for answer in answers]

    # -- capture

    def prefill_batches(self, batches: Iterable[list[np.ndarray]]) -> Iterator[list[States]]:
        return map(self.prefill, batches)

    def reduced_batches(self, batches: Iterable[list[Asked]]) -> Iterator[list[Reduced]]:
        return map(self.reduced, batches)

    def close(self) -> None:
        del self.model

    @torch.inference_mode()
    def prefill(self, rows: list[np.ndarray]) -> list[States]:
        """Hidden states of rows [T], from one batch."""
        return [
            States({b: to_storage(state) for b, state in zip(self.layers, aux, strict=True)}, to_storage(last))
            for aux, last in self.states(rows)
        ]

    @torch.inference_mode()
    def reduced(self, rows: list[Asked]) -> list[Reduced]:
        """What a compact dump keeps of rows, from one batch."""
        states = self.states([row.ids for row in rows])
        return [
            self.reducer(torch.cat(aux, dim=1), last[torch.from_numpy(row.teachers).to(self.device)], row.following)
            for row, (aux, last) in zip(rows, states, strict=True)
        ]

    def states(self, rows: list[np.ndarray]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Of each row: the boundaries and the last state, each [T, H], on the device."""
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, P], right-padded: causal rows never see it
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.from_numpy(np.concatenate(rows)).long()
        base = self.model.base_model
        with boundary_inputs(decoder_layers(self.model), self.layers) as captured:
            out = base(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device), use_cache=False)
        for n, length in enumerate(lengths.tolist()):
            kept = [*(captured[b][n, :length] for b in self.layers), out.last_hidden_state[n, :length]]
            *aux, last = (state.to(getattr(torch, self.dtype)) for state in kept)
            yield aux, last


def use_grouped_attention(model: torch.nn.Module) -> None:
    """Let decoding steps attend without copying the keys and values of each group of heads: on a CPU that copy is most of a step."""
    AttentionInterface.register("grouped_sdpa", grouped_attention)
    AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)
    model.set_attn_implementation("grouped_sdpa")


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention; for single queries [B, h, 1, d] the heads of a group become the query rows of their key head."""
    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # [B, kv, h / kv, d]
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return out.flatten(1, 2)[:, None], None  # [B, 1, h, d]


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers of a transformers causal language model, or of the language part of one that also reads images."""
    for part in (model.base_model, getattr(model.base_model, "language_model", None)):
        if isinstance(layers := getattr(part, "layers", None), torch.nn.ModuleList):
            return layers
    raise UserError(
        f"{type(model).__name__} has neither `model.layers` nor `model.language_model.layers`: its decoder layers could not be found, "
        f"so nothing can be captured from it"
    )


@contextmanager
def boundary_inputs(layers: torch.nn.ModuleList, boundaries: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Within the block a forward pass leaves what enters each of these layers, [B, P, H], in the mapping; for b = L what leaves the
    last one, before the final norm."""
    captured: dict[int, Tensor] = {}

    def hook(boundary: int):  # noqa: ANN202
        def keep(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            captured[boundary] = args[0] if args else kwargs["hidden_states"]

        return keep

    def keep_output(_module: torch.nn.Module, _args: tuple, output: Any) -> None:
        captured[len(layers)] = output[0] if isinstance(output, tuple) else output

    handles = [layers[b].register_forward_pre_hook(hook(b), with_kwargs=True) for b in boundaries if b < len(layers)]
    if len(layers) in boundaries:
        handles.append(layers[-1].register_forward_hook(keep_output))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def end_of_turn_ids(folder: Path) -> list[int]:
    """The ids that end an answer, from the generation config (else the config)."""
    ids = GenerationConfig.from_pretrained(folder).eos_token_id
    if ids is None:
        raise UserError(f"{folder}/generation_config.json names no eos_token_id: the end of an answer would never be seen")
    return [ids] if isinstance(ids, int) else list(ids)


def _draw(logits: Tensor, sampling: Sampling, draws: list[torch.Generator]) -> list[int]:
    """One token per row of logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = truncate(logits / sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p).softmax(-1)
    return [int(torch.multinomial(row, 1, generator=draw)) for row, draw in zip(probabilities, draws, strict=True)]


def truncate(logits: Tensor, top_p: float, top_k: int, min_p: float = 0.0) -> Tensor:
    """Logits [B, V] with everything outside the k most likely, the nucleus, and min_p of the likeliest, at -inf; in this order."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass ahead of each token
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    if min_p:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), float("-inf"))
    return logits
