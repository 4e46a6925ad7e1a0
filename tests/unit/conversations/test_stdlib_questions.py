"""Questions about the standard library: complete, stable, each object once."""

import subprocess
import sys

import pytest

from eagle3_offline.conversations import stdlib_questions as stdlib


@pytest.fixture(scope="module")
def conversations():
    return stdlib.questions()


def test_two_runs_give_the_same_questions(conversations):
    assert stdlib.questions() == conversations


def test_two_runs_give_the_same_documents_of_a_few_megabytes():
    first = stdlib.documents()
    assert first == stdlib.documents()
    assert 1e6 < sum(map(len, first)) < 5e6


def test_about_two_thousand_objects_each_once(conversations):
    ids = [conversation.id for conversation in conversations]
    assert 1500 <= len(ids) <= 3000
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids)


def test_a_question_is_one_user_message_in_a_group_of_its_own(conversations):
    fill = next(c for c in conversations if c.id == "stdlib:textwrap.fill")
    assert (fill.source, fill.group) == ("stdlib", "textwrap.fill")
    assert [message.role for message in fill.messages] == ["user"]
    assert "`textwrap.fill`" in fill.messages[0].content


def test_all_six_forms_are_used(conversations):
    used = {stdlib.form_of(conversation.group) for conversation in conversations}
    assert used == set(range(6))
    assert len(stdlib.FORMS) == 6


def test_the_form_depends_on_the_name_alone():
    assert [stdlib.form_of(name) for name in ("textwrap.fill", "os.listdir", "json.dumps")] == [1, 2, 4]


def test_answers_pair_with_the_questions_and_are_short(conversations):
    pairs = stdlib.answer_pairs()
    assert [question for question, _ in pairs] == [conversation.messages[0].content for conversation in conversations]
    assert all(0 < len(answer) <= stdlib.ANSWER_CHARACTERS for _, answer in pairs)


@pytest.mark.parametrize(
    ("doc", "short"),
    [
        ("Fill a paragraph.", "Fill a paragraph."),
        ("gmtime([seconds]) -> (tm_year,\n\nConvert seconds.", "Convert seconds."),
        ("f(x) -> y", "f(x) -> y"),
        ("Add.\n\n>>> add(1, 2)\n3", "Add."),
        ("One. Two.\n\nThree is too long.", "One. Two."),
        ("onelongsentence without end", "onelongsentence"),
    ],
)
def test_shorten(doc, short):
    assert stdlib.shorten(doc, characters=18) == short


def test_the_walk_leaves_the_caller_clean():
    code = "import sys; from eagle3_offline.conversations import stdlib_questions as s; s.questions(); print('asynchat' in sys.modules)"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
