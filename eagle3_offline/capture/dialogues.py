"""A conversation while the target answers it, turn by turn; every later prompt extends the ids so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..records import Conversation, Message, Reject, TokenRow, UserError
from ..target.engine import Completion, Request
from .target import OpenTarget


@dataclass
class Dialogue:
    """What was said so far, and what is still to be asked."""

    row: Conversation
    pending: list[Message]  # user messages not yet asked
    history: list[Message]  # messages so far, answers as text
    ids: list[int] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    reject: Reject | None = None

    @property
    def open(self) -> bool:
        """Whether there is a turn to ask: after an answer that was cut by length none is."""
        return self.reject is None and bool(self.pending) and "length" not in self.finish_reasons

    def token_row(self, split: str) -> TokenRow:
        ids = np.array(self.ids, np.int32)
        return TokenRow(self.row.id, self.row.source, split, ids, tuple(self.turns), tuple(self.finish_reasons))

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
            target.template.next_prompt(dialogue.ids, dialogue.history)
            if dialogue.turns
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
    return Request(f"{dialogue.row.id}#{len(dialogue.turns)}", prompt, min(max_tokens, target.context - len(prompt)))


def take(dialogue: Dialogue, request: Request, answer: Completion, target: OpenTarget) -> None:
    """Append an answer. One without any text is no answer: the row is rejected."""
    text = target.template.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    if not text.strip():
        dialogue.reject = Reject(
            f"no assistant turn: the target's answer to turn {len(dialogue.turns)} is empty", id=dialogue.row.id, retry=True
        )
        return
    start = len(request.prompt)
    dialogue.ids = [*request.prompt, *answer.token_ids]
    dialogue.turns.append((start, len(dialogue.ids)))
    dialogue.finish_reasons.append(answer.finish_reason)
    dialogue.history.append(Message("assistant", text))
