"""`regenerate --server`: every row ends in exactly one of done or error, whatever a server does; resume is by row id."""

import json
from dataclasses import replace

import pytest

from eagle3_offline.capture.journal import journal_path, reopen
from eagle3_offline.conversations.token_rows import read_token_rows, token_row_ids, write_token_rows
from eagle3_offline.records import Reject
from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump

from ...sglang.fake_server import ANSWER, FakeServer
from ...small_runs import Cli, write_recipe

FAST = {"timeout": 1.0, "attempts": 3, "patience": 20.0, "concurrency": 16}


def rows(count: int) -> list[dict]:
    return [{"id": f"row-{i}", "conversations": [{"role": "user", "content": f"question {i} of a test"}]} for i in range(count)]


@pytest.fixture
def prepared(random_target, tmp_path):
    """A run of 12 rows in two or more units, prepared."""

    def prepare(conversations, **regenerate):
        recipe = write_recipe(tmp_path, random_target, conversations, regenerate={**FAST, **regenerate}, max_rejected=1.0)
        cli = Cli(recipe, tmp_path / "run")
        cli.stage("prepare")
        return cli

    return prepare


def outcome(cli: Cli) -> tuple[list[str], dict[str, object]]:
    """Ids done, in order, and rejects by id."""
    run = Run(cli.run)
    units = [unit.unit for unit in run.read_plan().units]
    done = [row.id for unit in units for row in read_token_rows(run.tokens(unit))]
    rejects = [reject for unit in units for reject in run.read_rejects("regenerate", unit)]
    assert len({reject.id for reject in rejects}) == len(rejects) and len(set(done)) == len(done)
    assert not list((cli.run / "tokens").glob(".*"))  # no journal is left
    return done, {reject.id: reject for reject in rejects}


WAYS = ["empty", "blank", "500", "429", "malformed", "hang", "close", "abort", "400"]


@pytest.mark.parametrize("lasting", [False, True])
def test_every_row_is_done_or_rejected_whatever_the_server_does(prepared, random_target, lasting):
    """Three rows each get a misbehaviour, once or always; the others good answers."""
    prompts = {}

    def plan(prompt, attempt):
        way = prompts.setdefault(prompt, WAYS[len(prompts) % len(WAYS)] if len(prompts) < len(WAYS) else "good")
        return way if lasting or attempt == 0 else "good"

    cli = prepared(rows(20), timeout=3.0)  # a busy machine's good answers stay below it, or they would be asked for again
    with FakeServer(str(random_target), plan) as server:
        summary = cli.stage("regenerate", "--server", server.address)
    done, rejects = outcome(cli)
    assert sorted([*done, *rejects]) == sorted(f"row-{i}" for i in range(20))
    assert summary["done"] == len(done) and summary["rejected"] == len(rejects)
    final = {"empty", "blank", "400"}  # answers of their own: asking again gives the same
    assert len(rejects) == (len(WAYS) if lasting else len(final))
    assert sum(not reject.retry for reject in rejects.values()) == 1  # the 400
    tried = {prompts[prompt]: count for prompt, count in server.attempts.items()}
    assert all(count == (1 if way in final | {"good"} else 3 if lasting else 2) for way, count in tried.items())
    waited = {prompts[prompt]: times for prompt, times in server.times.items()}["429"]
    assert all(after - before >= 1 for before, after in zip(waited, waited[1:], strict=False))  # Retry-After
    run = Run(cli.run)
    for row in (row for unit in run.read_plan().units for row in read_token_rows(run.tokens(unit.unit))):
        start, end = row.turns[0]
        assert row.input_ids[start:end].tolist() == [*ANSWER, 2] and row.finish_reasons == ("stop",)


def test_rejected_rows_can_be_asked_again_alone(prepared, random_target):
    cli = prepared(rows(12))
    first = {}
    with FakeServer(str(random_target), lambda prompt, _: first.setdefault(prompt, "500" if len(first) % 4 == 0 else "good")) as server:
        cli.stage("regenerate", "--server", server.address)
        done, rejects = outcome(cli)
        assert len(rejects) == 3
    with FakeServer(str(random_target), lambda *_: "good") as server:
        cli.stage("regenerate", "--server", server.address)
        assert not server.attempts  # finished units are skipped
        summary = cli.stage("regenerate", "--server", server.address, "--retry-errors")
        assert len(server.attempts) == 3
    again, rejects = outcome(cli)
    assert summary["done"] == 12 and not rejects
    planned = [row for unit in Run(cli.run).read_plan().units for row in unit.rows]
    assert again == planned  # in their old places


def test_finished_rows_of_an_interrupted_unit_are_kept(prepared, random_target):
    """A journal whose last line is torn, in any order: the rows in it are not asked again."""
    cli = prepared(rows(12))
    run = Run(cli.run)
    unit = run.read_plan().units[0]
    with FakeServer(str(random_target), lambda *_: "good") as server:
        cli.stage("regenerate", "--server", server.address, "--units", "0")
        whole = [json.dumps(row.input_ids.tolist()) for row in read_token_rows(run.tokens(0))]
    run.write_rejects("regenerate", 0, [Reject("none such", id="ghost", retry=True)])  # so that it is reopened
    assert reopen(run, unit, "regenerate") == 1
    path = journal_path(run, 0)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines[2:])) + lines[0][:20])
    with FakeServer(str(random_target), lambda *_: "good") as server:
        cli.stage("regenerate", "--server", server.address, "--units", "0")
        assert len(server.attempts) == 2
    assert [json.dumps(row.input_ids.tolist()) for row in read_token_rows(run.tokens(0))] == whole


def test_as_many_requests_as_allowed_are_in_flight(prepared, random_target):
    cli = prepared(rows(16), concurrency=6, timeout=20.0)
    with FakeServer(str(random_target), lambda _, attempt: "429" if attempt == 0 else "slow") as server:
        cli.stage("regenerate", "--server", server.address)
    assert 2 <= server.most_together <= 6


@pytest.mark.parametrize(
    "plan, model, message",
    [
        ("text only", None, "returns no token ids"),
        ("good", "/some/other/model", "this run's target is"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_with_the_reason(prepared, random_target, plan, model, message):
    cli = prepared(rows(8))
    with FakeServer(model or str(random_target), lambda *_: plan) as server:
        assert message in cli.stage("regenerate", "--server", server.address, exit_code=2)


def test_no_living_server_ends_the_stage(prepared, random_target):
    cli = prepared(rows(8), patience=1.5)
    assert "no server lives" in cli.stage("regenerate", "--server", "127.0.0.1:9", exit_code=1)


# ---------------------------------------------------------------------------------------------------------------------
# A target that thinks: each turn a token row of its own

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
THREE_TURNS = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")][:5]


@pytest.fixture
def thinking(random_target, tmp_path):
    """A run of two conversations, of three turns and of one, with that template."""

    def prepare(answer, *words):
        (tmp_path / "thinking.jinja").write_text(THINKING)
        conversations = [{"id": "long", "conversations": THREE_TURNS}, {"id": "short", "conversations": THREE_TURNS[:1]}]
        recipe = write_recipe(
            tmp_path, random_target, conversations, regenerate=FAST, prepare={"eval_rows": None, "eval_share": 0.0, "unit_rows": 8},
            target={"model": str(random_target), "chat_template": str(tmp_path / "thinking.jinja"), "max_length": 500},
        )  # fmt: skip
        cli = Cli(recipe, tmp_path / "run")
        cli.stage("prepare")
        with FakeServer(str(random_target), lambda *_: "good", answer) as server:
            summary = cli.stage("regenerate", "--server", server.address, *words)
        assert summary["done"] == 2 and summary["rejected"] == 0
        return cli

    return prepare


@pytest.mark.parametrize("reasoning, thought, opened", [("drop", "<think>\nhm\n</think>\n\n", ""), ("off", "", "<think>\n\n</think>\n\n")])
def test_each_turn_is_a_token_row_with_the_history_that_a_server_sees(thinking, random_target, reasoning, thought, opened):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_target)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    cli = thinking([*encode(thought + "abc"), 2], "--reasoning", reasoning)
    run = Run(cli.run)
    rows = {row.id: row for row in read_token_rows(run.tokens(0))}
    assert list(rows) in (["long#0", "long#1", "long#2", "short"], ["short", "long#0", "long#1", "long#2"])
    asked = "<|im_start|>user\nuser 0<|im_end|>\n<|im_start|>assistant\n"
    later = [f"abc<|im_end|>\n<|im_start|>user\nuser {n}<|im_end|>\n<|im_start|>assistant\n" for n in (1, 2)]
    prompts = {"short": asked, "long#0": asked, "long#1": asked + later[0], "long#2": asked + later[0] + later[1]}
    for name, prompt in prompts.items():
        before, answer = encode(prompt + opened), [*encode(thought + "abc"), 2]
        assert rows[name].input_ids.tolist() == before + answer
        assert rows[name].turns == ((len(before), len(before) + len(answer)),) and rows[name].finish_reasons == ("stop",)
    assert run.claimed("regenerate")["reasoning"] == reasoning
    texts = {text["id"]: [m["content"] for m in text["conversations"]] for text in map(json.loads, run.regenerated(0).open())}
    assert texts == {"long": ["user 0", "abc", "user 1", "abc", "user 2", "abc"], "short": ["user 0", "abc"]}

    # the journal of a reopened unit holds them all, and the dump's rows are these
    run.write_rejects("regenerate", 0, [Reject("none such", id="ghost", retry=True)])
    assert reopen(run, run.read_plan().units[0], "regenerate") == 1
    run.write_rejects("regenerate", 0, [])
    with FakeServer(str(random_target), lambda *_: "good") as server:
        cli.stage("regenerate", "--server", server.address, "--reasoning", reasoning)
        assert not server.attempts
    again = read_token_rows(run.tokens(0))
    assert [(row.id, row.input_ids.tolist(), row.turns) for row in again] == [(n, r.input_ids.tolist(), r.turns) for n, r in rows.items()]
    assert cli.stage("dump-hidden")["done"] == 4
    assert cli.stage("store", "seal")["done"] == 4
    dump = Dump.open(run.dump)
    assert [dump.ids(n) for n in range(4)] == list(rows)


def test_a_turn_whose_prompt_begins_with_all_ids_so_far_goes_on_in_their_row(thinking):
    """Under drop, where there was no thought to drop."""
    cli = thinking([*ANSWER, 2], "--reasoning", "drop")
    rows = {row.id: row for row in read_token_rows(Run(cli.run).tokens(0))}
    assert {name: len(row.turns) for name, row in rows.items()} == {"long": 3, "short": 1}
    for start, end in rows["long"].turns:
        assert rows["long"].input_ids[start:end].tolist() == [*ANSWER, 2]


def test_kept_thoughts_are_one_row(thinking, random_target):
    cli = thinking([*ANSWER, 2])
    rows = {row.id: row for row in read_token_rows(Run(cli.run).tokens(0))}
    assert {name: len(row.turns) for name, row in rows.items()} == {"long": 3, "short": 1}
    assert "reasoning was 'keep', is now 'off'" in cli.stage("regenerate", "--set", "regenerate.reasoning=off", exit_code=2)


def test_what_a_planned_conversation_stands_for(thinking):
    """Its token rows, or itself where there are none; rows of others are left to the seal's check."""
    cli = thinking([*ANSWER, 2])
    run = Run(cli.run)
    unit = run.read_plan().units[0]
    assert sorted(token_row_ids(run, unit)) == ["long", "short"]
    rows = read_token_rows(run.tokens(0))
    write_token_rows(run.tokens(0), [replace(rows[0], id=f"{unit.rows[0]}#{n}") for n in (0, 1)] + [replace(rows[0], id="foreign")])
    assert token_row_ids(run, unit) == (f"{unit.rows[0]}#0", f"{unit.rows[0]}#1", unit.rows[1])
