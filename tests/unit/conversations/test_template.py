"""Later turns are appended to the engine's own ids; the text of earlier answers is never tokenised again."""

import pytest

from eagle3_offline.conversations.template import ChatTemplate
from eagle3_offline.records import Message, UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class LetterTokenizer:
    """One id per character; `<|im_end|>` is one token, 1."""

    chat_template = CHATML

    def apply_chat_template(self, messages, chat_template, tokenize, add_generation_prompt):
        from jinja2 import Template

        return Template(chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt)

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text.replace("<|im_end|>", "\x01")]}


def ids(text):
    return [ord(c) for c in text.replace("<|im_end|>", "\x01")]


def test_first_and_next_prompt():
    template = ChatTemplate(LetterTokenizer())
    first = template.first_prompt([Message("user", "hi")])
    assert first == ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    engine_ids = [*first, 7001, 7002, 1]  # ids that no text gives; the answer ended
    history = [Message("user", "hi"), Message("assistant", "whatever it decodes to"), Message("user", "more")]
    assert template.next_prompt(engine_ids, history) == engine_ids + ids("\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_rewrites_the_history_is_refused():
    class Reasoning(LetterTokenizer):
        chat_template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:3] }}")

    with pytest.raises(UserError, match="rewrites earlier turns"):
        ChatTemplate(Reasoning()).next_prompt([1], [Message("user", "long question"), Message("assistant", "answer"), Message("user", "b")])


def test_no_template(tmp_path):
    class Bare(LetterTokenizer):
        chat_template = None

    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate(Bare())
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    assert ChatTemplate(Bare(), str(tmp_path / "own.jinja")).first_prompt([Message("user", "hi")]) == ids("hi")
