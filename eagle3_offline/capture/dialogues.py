"""A conversation while the target answers it, turn by turn.

A turn whose prompt begins with all ids so far goes on in the same token row. One whose prompt does not, since the chat template leaves
earlier thoughts out, begins a row of its own: there the earlier answers are history, and only what the target says next is learnt.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..records import Conversation, Message, Reject, TokenRow, UserError
from ..target.engine import Completion, Request
from .target import OpenTarget


@dataclass
class Answered:
    """A token row in the making."""

    ids: list[int]
    turns: list[tuple[int, int]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)


@dataclass
class Dialogue:
    """What was said so far, and what is still to be asked."""

    row: Conversation
    pending: list[Message]  # user messages not yet asked
    history: list[Message]  # messages so far, answers as text
    answered: list[Answered] = field(default_factory=list)
    reject: Reject | None = None

    @property
    def open(self) -> bool:
        """Whether there is a turn to ask: after an answer that was cut by length none is."""
        return self.reject is None and bool(self.pending) and not (self.answered and "length" in self.answered[-1].finish_reasons)

    @property
    def turns(self) -> int:
        """How many answers there are."""
        return sum(len(row.turns) for row in self.answered)

    @property
    def answer_tokens(self) -> int:
        return sum(end - start for row in self.answered for start, end in row.turns)

    def token_rows(self, split: str) -> list[TokenRow]:
        """Under the conversation's id; several under id#0, id#1, ..."""
        names = [self.row.id] if len(self.answered) == 1 else [f"{self.row.id}#{n}" for n in range(len(self.answered))]
        return [
            TokenRow(name, self.row.source, split, np.array(row.ids, np.int32), tuple(row.turns), tuple(row.finish_reasons))
            for name, row in zip(names, self.answered, strict=True)
        ]

    def text(self) -> dict[str, Any]:
        """For people and other tools."""
        return {"id": self.row.id, "conversations": [dataclasses.asdict(m) for m in self.history], "source": self.row.source}


def begin(row: Conversation) -> Dialogue:
    history = [message for message in row.messages if message.role == "system"]
    return Dialogue(row, [message for message in row.messages if message.role == "user"], history)


def ask(dialogue: Dialogue, target: OpenTarget, max_tokens: int) -> Request | None:
    """The request for the next answer; None (and a reject) where it can't be asked."""
    dialogue.history.append(dialogue.pending.pop(0))
    try:
        prompt = (
            target.template.next_prompt(dialogue.answered[-1].ids, dialogue.history)
            if dialogue.answered
            else target.template.first_prompt(dialogue.history)
        )
    except UserError as error:
        dialogue.reject = Reject(str(error), id=dialogue.row.id)
        return None
    if len(prompt) >= target.context:
        dialogue.reject = Reject(
            f"the prompt has {len(prompt)} tokens; with at least one answer token the limit is {target.context}", id=dialogue.row.id
        )
        return None
    return Request(f"{dialogue.row.id}#{dialogue.turns}", prompt, min(max_tokens, target.context - len(prompt)))


def take(dialogue: Dialogue, request: Request, answer: Completion, target: OpenTarget) -> None:
    """Append an answer. One without any text is no answer: the row is rejected."""
    text = target.template.spoken(answer.token_ids)
    if not text.strip():
        dialogue.reject = Reject(
            f"no assistant turn: the target's answer to turn {dialogue.turns} is empty", id=dialogue.row.id, retry=True
        )
        return
    start = len(request.prompt)
    if not dialogue.answered or request.prompt[: len(dialogue.answered[-1].ids)] != dialogue.answered[-1].ids:
        dialogue.answered.append(Answered([]))
    row = dialogue.answered[-1]
    row.ids = [*request.prompt, *answer.token_ids]
    row.turns.append((start, len(row.ids)))
    row.finish_reasons.append(answer.finish_reason)
    dialogue.history.append(Message("assistant", text))
