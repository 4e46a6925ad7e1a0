"""Frozen types that cross the boundaries between packages. Legend: T tokens, H hidden size, N rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# How a floating dtype of the engine lies in memory and on disk. numpy has no bfloat16, so its bits travel as uint16.
STORAGE_DTYPE = {"bfloat16": np.dtype("uint16"), "float16": np.dtype("float16"), "float32": np.dtype("float32")}

SPLITS = ("train", "eval")


class UserError(ValueError):
    """Something that the user can mend. The message says what was found, what was expected and what to do. Exit code 2."""


class TooManyRejected(Exception):
    """A stage rejected a larger share of its rows than `max_rejected` allows. Exit code 3."""


class CheckFailed(Exception):
    """Something that must hold does not: a check of the demo, a loss that stays finite. Exit code 1."""


class EngineFailed(Exception):
    """The target's engine died, or gave what it must not. What it was working on is not done; a re-run can help. Exit code 1."""


class RankFailed(Exception):
    """One of a training's processes failed, and the others were ended; a re-run goes on from the newest checkpoint. Exit code 1."""


class Stopped(Exception):
    """A signal asked the stage to stop; everything finished so far is kept and a re-run goes on. Exit code 85."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the user gave it. `group` decides the split: rows of one group never straddle train and eval."""

    id: str
    messages: tuple[Message, ...]
    source: str
    group: str


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that a stage could not do. `retry` says whether running it again can help."""

    reason: str
    id: str | None = None
    file: str | None = None
    line: int | None = None
    retry: bool = False


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One conversation as the engine's own token ids.

    `turns` are the half-open token ranges [start, end) that the target generated, in order: the supervised tokens.
    `finish_reasons` has one entry per turn: "stop" or "length".
    """

    id: str
    source: str
    split: str
    input_ids: np.ndarray  # [T] int32
    turns: tuple[tuple[int, int], ...]
    finish_reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        previous = 0
        for start, end in self.turns:
            if not previous <= start < end <= len(self.input_ids):
                raise ValueError(f"row {self.id}: turn [{start}, {end}) is empty, out of order or outside its {len(self.input_ids)} tokens")
            previous = end

    @property
    def loss_mask(self) -> np.ndarray:
        """[T] uint8: 1 exactly where the target generated the token."""
        return (turn_of_token(self.turns, len(self.input_ids)) > 0).astype(np.uint8)

    @property
    def supervised(self) -> int:
        """Number of tokens that the target generated."""
        return sum(end - start for start, end in self.turns)


@dataclass(frozen=True, slots=True)
class TopLogits:
    """A compact teacher: at n tokens the k largest logits of the whole vocabulary, the token that followed always among them."""

    ids: np.ndarray  # [n, k] int32 target ids, by falling logit; the last gives way to the token that followed, where it has to
    log_probs: np.ndarray  # [n, k] float16: logit - log_normaliser
    log_normaliser: np.ndarray  # [n] float32: log-sum-exp of all logits


@dataclass(frozen=True, slots=True)
class CapturedRow:
    """A token row with what the store keeps of the target, states in storage dtype (`STORAGE_DTYPE`).

    `aux` holds the captured layers side by side, low to high: the raw residual stream entering each (boundary index, before any
    norm), C = n_aux * H; of a compact dump their projection, C = r. The teacher is needed at tokens t where m[t-1], m[t] or m[t+1]
    is 1 (`store.format.last_positions`): `last` is the target's final hidden state after its final norm, the input of lm_head;
    a compact dump has `top` instead.
    """

    row: TokenRow
    aux: np.ndarray  # [T, C]
    last: np.ndarray | None  # [T_last, H]
    top: TopLogits | None = None  # n = T_last


@dataclass(frozen=True, slots=True)
class Sample:
    """What the store's reader gives for one row, or for a window of its tokens; the same for every mode of a dump."""

    id: str
    input_ids: np.ndarray  # [T] int32
    turns: tuple[tuple[int, int], ...]
    aux: np.ndarray  # [T, C] storage dtype: the layers asked for, side by side, or the projection
    last: np.ndarray | None  # [T_last, H] storage dtype; None in a compact dump
    last_positions: np.ndarray  # [T_last] int64: token position of each row of `last` or `top`
    top: TopLogits | None = None  # n = T_last; only in a compact dump


Summary = dict[str, Any]  # what a stage prints with --json: plain JSON values only


def turn_of_token(turns: tuple[tuple[int, int], ...], length: int) -> np.ndarray:
    """[length] int32: 1, 2, ... for the tokens of the first, second, ... answer, 0 elsewhere."""
    turn = np.zeros(length, np.int32)
    for number, (start, end) in enumerate(turns, start=1):
        turn[start:end] = number
    return turn
