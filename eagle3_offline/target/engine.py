"""What a target engine does. Every engine gives its own token ids and its own hidden states; nothing is tokenised again.

Boundary index b = the residual stream entering decoder layer b (0-based) = the output of layer b - 1 = hidden_states[b] of
Hugging Face, for b < L. Boundary L is what enters the final norm; Hugging Face's hidden_states[L] is what leaves it.
Legend: T tokens of a row, H hidden size, L decoder layers, n teachers, r rank of a compact dump.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..records import TopLogits, UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 are off."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_p: float = 0.0

    def seed_of(self, request: str) -> int:
        """The seed of one answer, from the seed and the request's id alone."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {request}".encode()).digest()[:7], "big")


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to generate. `id` and the seed alone decide what is sampled."""

    id: str
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The engine's own ids of an answer; the end-of-turn token, where one came, is its last."""

    token_ids: list[int]
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True, slots=True)
class States:
    """A row's hidden states in storage dtype (records.STORAGE_DTYPE)."""

    aux: dict[int, np.ndarray]  # boundary -> [T, H], raw residual stream
    last: np.ndarray  # [T, H], after the final norm

    def side_by_side(self) -> np.ndarray:
        """[T, n_aux * H]: the captured layers, low to high."""
        return np.concatenate([self.aux[boundary] for boundary in sorted(self.aux)], axis=1)


@dataclass(frozen=True, slots=True)
class Asked:
    """A row to read and to reduce."""

    ids: np.ndarray  # [T] int32
    teachers: np.ndarray | None  # [n] int64, ascending: tokens whose last state is needed; None: the states themselves are asked for

    @property
    def following(self) -> np.ndarray:
        """[n]: the token after each teacher, -1 where the row ends."""
        return np.append(self.ids, -1)[self.teachers + 1]


@dataclass(frozen=True, slots=True)
class Reduced:
    """What a compact dump keeps of a row."""

    aux: np.ndarray  # [T, r] storage dtype
    top: TopLogits  # of the n teachers


class Engine(Protocol):
    """Runs the target over whole rows. Both engines do; answers come from one of them in batches, from SGLang over HTTP."""

    name: str
    version: str
    dtype: str  # key of records.STORAGE_DTYPE
    longest_row: int | None  # in tokens; None: as long as the target's context

    def prefill_batches(self, batches: Iterable[list[np.ndarray]]) -> Iterator[list[States]]:
        """Hidden states of each batch of whole rows [T] int32, in order. May be ahead of the caller by a batch."""

    def reduced_batches(self, batches: Iterable[list[Asked]]) -> Iterator[list[Reduced]]:
        """The same for a compact dump: reduced on the engine's device. Only of an engine that was given a `Reducer`."""

    def close(self) -> None:
        """Free what it holds; it is not used again."""


def capture_layers(wanted: list[int], num_layers: int) -> tuple[int, ...]:
    """The boundaries to capture: those asked for, or [2, L//2, L-3]. Raises UserError where they collide or do not exist."""
    layers = tuple(sorted(wanted)) if wanted else (2, num_layers // 2, num_layers - 3)
    if not wanted and not 2 < layers[1] < layers[2]:
        raise UserError(
            f"the target has {num_layers} decoder layers, so the default boundaries [2, L//2, L-3] = {list(layers)} collide; "
            f"name distinct ones between 0 and {num_layers} with --set target.layers=[...]"
        )
    if len(set(layers)) != len(layers) or not all(0 <= b <= num_layers for b in layers):
        raise UserError(f"target.layers is {list(wanted)}; expected distinct boundary indices between 0 and {num_layers}")
    return layers
