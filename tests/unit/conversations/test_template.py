"""Later turns are appended to the engine's own ids; the text of earlier answers is never tokenised again."""

import types

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

    def apply_chat_template(self, messages, chat_template, tokenize, add_generation_prompt, **variables):
        from jinja2 import Template

        return Template(chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)

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


# ---------------------------------------------------------------------------------------------------------------------
# Targets that think. The template is Qwen3's in short: earlier thoughts are cut away, an empty one turns thinking off

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class ThinkingTokenizer(LetterTokenizer):
    chat_template = THINKING
    added_tokens_decoder = {1: types.SimpleNamespace(content="<|im_end|>", special=True)}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i) for i in ids).replace("\x01", "" if skip_special_tokens else "<|im_end|>")


HISTORY = [Message("user", "hi"), Message("assistant", "yes"), Message("user", "more")]
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_dropped_thoughts_are_in_their_answer_and_not_in_the_history():
    template = ChatTemplate(ThinkingTokenizer(), reasoning="drop")
    assert template.first_prompt(HISTORY[:1]) == ids(ASKED)
    answer = ids("<think>\nhm\n</think>\n\nyes<|im_end|>")
    assert template.spoken(answer) == "yes"
    wanted = ids(ASKED + "yes<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")
    assert template.next_prompt([*ids(ASKED), *answer], HISTORY) == wanted
    assert template.spoken(ids("no thought<|im_end|>")) == "no thought"
    harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|im_end|>"  # gpt-oss
    assert template.spoken(ids(harmony)) == "yes"


def test_thinking_turned_off_is_an_empty_thought_in_the_prompt_alone():
    template = ChatTemplate(ThinkingTokenizer(), reasoning="off")
    empty = "<think>\n\n</think>\n\n"
    assert template.first_prompt(HISTORY[:1]) == ids(ASKED + empty)
    wanted = ids(ASKED + "yes<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n" + empty)
    assert template.next_prompt(ids(ASKED + empty + "yes<|im_end|>"), HISTORY) == wanted


def test_kept_thoughts_stay_where_they_were_generated():
    template = ChatTemplate(ThinkingTokenizer())
    answer = ids("<think>\nhm\n</think>\n\nyes<|im_end|>")
    assert template.spoken(answer) == "<think>\nhm\n</think>\n\nyes"
    wanted = [*ids(ASKED), *answer, *ids("\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")]
    assert template.next_prompt([*ids(ASKED), *answer], HISTORY) == wanted


def test_other_names_of_the_switch_and_templates_without_one():
    class Granite(ThinkingTokenizer):
        chat_template = CHATML + "{% if thinking %}<think>{% endif %}"

    assert ChatTemplate(Granite()).reasoned("off").variables == {"thinking": False}
    with pytest.raises(UserError, match=r"no switch \(enable_thinking or thinking\).*keep for a target that never thinks, drop"):
        ChatTemplate(LetterTokenizer(), reasoning="off")
