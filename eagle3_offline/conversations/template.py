"""Chat template to token ids. What the engine said is never tokenised again: later turns are appended to its ids."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..records import Message, UserError

SENTINEL = "\u2402answer\u2403"  # stands for an answer while the text around it is rendered


class ChatTemplate:
    """The tokenizer's chat template, or one of the user's own."""

    def __init__(self, tokenizer: Any, file: str | None = None):
        """tokenizer: a transformers tokenizer; file: a Jinja template that replaces the tokenizer's."""
        self.tokenizer = tokenizer
        self.text = Path(file).read_text(encoding="utf-8") if file else tokenizer.chat_template
        if not self.text:
            raise UserError("the target's tokenizer has no chat template: give one with --set target.chat_template=FILE")

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def first_prompt(self, messages: list[Message]) -> list[int]:
        """Ids that ask for the first answer: an optional system message and one user message."""
        return self._ids(self._render(messages))

    def next_prompt(self, ids: list[int], messages: list[Message]) -> list[int]:
        """`ids` (prompt and answers so far, the last one ended) plus the ids between its end and the next answer.

        messages: the history, ending with the new user message; the text of earlier answers does not matter.
        Raises UserError where the template rewrites the history, so that appending would not give what it renders.
        """
        before = [Message("assistant", SENTINEL) if message.role == "assistant" else message for message in messages]
        text = self._render(before)
        head, found, tail = text.rpartition(SENTINEL)
        if not found or head != self._render(before[:-2]):
            raise UserError(
                "the chat template rewrites earlier turns, so a multi-turn row cannot be one token row; split it into single turns"
            )
        between = self._ids(tail)
        if between[0] == ids[-1]:  # the engine's own end-of-turn token
            between = between[1:]
        return [*ids, *between]

    def _render(self, messages: list[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return self.tokenizer.apply_chat_template(turns, chat_template=self.text, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
