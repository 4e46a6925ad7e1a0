"""Chat template to token ids. What the engine said is never tokenised again: later turns are appended to its ids.

But for the history of a target that thinks (`regenerate.reasoning` is drop or off): a server gets earlier answers as text, without
their thoughts, and tokenises that. So does `next_prompt` then; what is learnt are the ids of the answer that follows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from ..records import Message, UserError

SENTINEL = "\u2402answer\u2403"  # stands for an answer while the text around it is rendered
SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn thinking off: Qwen3, SmolLM3, GLM; DeepSeek, Granite
THOUGHT_ENDS = ("</think>", "<|channel|>final<|message|>")  # what stands between a thought and the answer: most targets; gpt-oss

Reasoning = Literal["keep", "drop", "off"]


class ChatTemplate:
    """The tokenizer's chat template, or one of the user's own."""

    def __init__(self, tokenizer: Any, file: str | None = None, reasoning: Reasoning = "keep"):
        """tokenizer: a transformers tokenizer; file: a Jinja template that replaces the tokenizer's; reasoning: see the recipe key."""
        self.tokenizer, self.file, self.reasoning = tokenizer, file, reasoning
        self.text = Path(file).read_text(encoding="utf-8") if file else tokenizer.chat_template
        if not self.text:
            raise UserError("the target's tokenizer has no chat template: give one with --set target.chat_template=FILE")
        self.variables = {self._switch(): False} if reasoning == "off" else {}

    def reasoned(self, reasoning: Reasoning) -> ChatTemplate:
        """The same template for another way with thoughts. Raises UserError where they can't be turned off."""
        return ChatTemplate(self.tokenizer, self.file, reasoning)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def first_prompt(self, messages: list[Message]) -> list[int]:
        """Ids that ask for the first answer: an optional system message and one user message."""
        return self._ids(self._render(messages, **self.variables))

    def next_prompt(self, ids: list[int], messages: list[Message]) -> list[int]:
        """Ids that ask for a later answer. messages: the history, ending with the new user message.

        Thoughts kept: `ids` (prompt and answers so far, the last one ended) plus the ids between its end and the next answer; the
        text of earlier answers does not matter. Raises UserError where the template rewrites the history, so that appending would
        not give what it renders. Else: the whole history anew, in which earlier answers are what `spoken` gave.
        """
        if self.reasoning != "keep":
            return self.first_prompt(messages)
        before = [Message("assistant", SENTINEL) if message.role == "assistant" else message for message in messages]
        text = self._render(before)
        head, found, tail = text.rpartition(SENTINEL)
        if not found or head != self._render(before[:-2]):
            raise UserError(
                "the chat template rewrites earlier turns, so a multi-turn row cannot be one token row: make each turn one of its own "
                "with --reasoning drop, or split it into single turns"
            )
        between = self._ids(tail)
        if between[0] == ids[-1]:  # the engine's own end-of-turn token
            between = between[1:]
        return [*ids, *between]

    def spoken(self, ids: list[int]) -> str:
        """The text of an answer; its thought left out, but where thoughts are kept."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        after = max((text.rfind(end) + len(end) for end in THOUGHT_ENDS if end in text), default=0)
        if self.reasoning == "keep" or not after:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        answer = text[after:]
        for token in self.tokenizer.added_tokens_decoder.values():
            answer = answer.replace(token.content, "") if token.special else answer
        return answer.lstrip("\n")

    def _switch(self) -> str:
        """The variable that turns thinking off: the one by which the template renders something else."""
        probe = [Message("user", "Hello")]
        for name in SWITCHES:
            if self._render(probe, **{name: False}) != self._render(probe, **{name: True}):
                return name
        raise UserError(
            f"the chat template has no switch ({' or '.join(SWITCHES)}) that turns thinking off: use --reasoning keep for a target that "
            f"never thinks, drop for one that always does"
        )

    def _render(self, messages: list[Message], **variables: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return self.tokenizer.apply_chat_template(turns, chat_template=self.text, tokenize=False, add_generation_prompt=True, **variables)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
