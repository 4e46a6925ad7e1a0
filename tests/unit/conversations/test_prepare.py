"""Bad input becomes rejects with file, line and reason; nothing else is lost and the counts add up."""

import json

import pytest

from eagle3_offline.config import PrepareConfig
from eagle3_offline.conversations.prepare import prepare, read_unit
from eagle3_offline.records import TooManyRejected, UserError
from eagle3_offline.runs import Run, SettingsChanged


def user(text):
    return {"role": "user", "content": text}


def write(path, lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return str(path)


GOOD = [{"id": f"row-{i}", "conversations": [user(f"question {i}")]} for i in range(20)]
BAD = [
    (b"{not json\n", "not valid JSON"),
    (b"\xff\xfe\n", "not valid JSON"),
    (["a list"], "expected an object"),
    ({"id": "e1", "conversations": []}, "empty conversation"),
    ({"id": "e2"}, "empty conversation"),
    ({"id": "e3", "conversations": "text"}, "expected a list"),
    ({"id": "e4", "conversations": [{"role": "system", "content": "be kind"}]}, "no user turn"),
    ({"id": "e5", "conversations": [{"role": "robot", "content": "x"}]}, "expected {"),
    ({"id": "e6", "conversations": [user("  ")]}, "is empty"),
    ({"id": "e7", "conversations": [user("a"), user("b")]}, "in turns"),
    (b'{"id": "e8", "conversations": [{"role": "user", "content": "\\ud800"}]}\n', "not valid Unicode"),
    ({"id": "row-3", "conversations": [user("again")]}, "occurs twice"),
]


def test_bad_rows_are_rejected_with_their_place_and_the_others_go_on(tmp_path):
    lines = GOOD[:10] + [bad for bad, _ in BAD] + GOOD[10:]
    source = write(tmp_path / "mixed.jsonl", lines)
    run = Run(tmp_path / "run")
    summary = prepare(run, PrepareConfig(inputs=[source], unit_rows=6), max_rejected=1.0)
    assert summary["done"] == 20 and summary["rejected"] == len(BAD)  # in = done + rejected
    rejects = run.read_rejects("prepare", None)
    for reject, (_, reason) in zip(rejects, BAD, strict=True):
        assert reason in reject.reason
    assert [reject.line for reject in rejects[:-1]] == list(range(11, 11 + len(BAD) - 1))
    assert all(reject.file == source for reject in rejects[:-1])
    ids = [row.id for unit in run.read_plan().units for row in read_unit(run, unit)]
    assert sorted(ids) == sorted(row["id"] for row in GOOD)


def test_too_many_rejects_stop_the_stage_after_everything_is_written(tmp_path):
    source = write(tmp_path / "mixed.jsonl", GOOD + [bad for bad, _ in BAD])
    run = Run(tmp_path / "run")
    with pytest.raises(TooManyRejected, match="12 of 32 rows were rejected"):
        prepare(run, PrepareConfig(inputs=[source]), max_rejected=0.01)
    assert run.plan_path.is_file() and len(run.read_rejects("prepare", None)) == 12


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
        prepare(Run(tmp_path), PrepareConfig(inputs=["nowhere.jsonl"]), 0.01)


def test_nothing_left_to_train_on(tmp_path):
    source = write(tmp_path / "few.jsonl", GOOD[:2])
    with pytest.raises(UserError, match="no row is left"):
        prepare(Run(tmp_path / "run"), PrepareConfig(inputs=[source], eval_rows=5), 0.01)


def test_groups_never_straddle_the_split_and_units_never_mix(tmp_path):
    rows = [{"id": f"r{i}", "conversations": [user(f"q{i}")], "group": f"g{i // 4}"} for i in range(80)]
    run = Run(tmp_path / "run")
    summary = prepare(run, PrepareConfig(inputs=[write(tmp_path / "rows.jsonl", rows)], eval_rows=5, unit_rows=7), 0.01)
    assert (summary["train"], summary["eval"]) == (60, 20)
    groups = {"train": set(), "eval": set()}
    for unit in run.read_plan().units:
        for row in read_unit(run, unit):
            groups[unit.split].add(row.group)
    assert len(groups["eval"]) == 5 and not groups["train"] & groups["eval"]


def test_order_and_split_do_not_depend_on_the_order_of_the_input(tmp_path):
    plans = []
    for name, rows in (("a", GOOD), ("b", GOOD[::-1])):
        run = Run(tmp_path / name)
        prepare(run, PrepareConfig(inputs=[write(tmp_path / "rows.jsonl", rows)], eval_share=0.3), 0.01)
        plans.append(run.read_plan())
    assert plans[0] == plans[1]


def test_a_second_run_changes_nothing_and_other_settings_are_refused(tmp_path):
    source = write(tmp_path / "rows.jsonl", GOOD)
    run = Run(tmp_path / "run")
    prepare(run, PrepareConfig(inputs=[source]), 0.01)
    before = run.plan_path.stat().st_mtime_ns
    prepare(run, PrepareConfig(inputs=[source]), 0.01)
    assert run.plan_path.stat().st_mtime_ns == before
    with pytest.raises(SettingsChanged, match="unit_rows was 2000, is now 5"):
        prepare(run, PrepareConfig(inputs=[source], unit_rows=5), 0.01)
    write(tmp_path / "rows.jsonl", GOOD[:-1])
    with pytest.raises(SettingsChanged, match="content"):
        prepare(run, PrepareConfig(inputs=[source]), 0.01)


def test_a_system_prompt_goes_before_every_conversation_without_one(tmp_path):
    rows = [GOOD[0], {"id": "own", "conversations": [{"role": "system", "content": "mine"}, user("q")]}, GOOD[1]]
    run = Run(tmp_path / "run")
    prepare(run, PrepareConfig(inputs=[write(tmp_path / "rows.jsonl", rows)], system_prompt="be kind", eval_share=0.0), 0.01)
    prompts = {row.id: row.messages[0].content for unit in run.read_plan().units for row in read_unit(run, unit)}
    assert prompts == {"row-0": "be kind", "row-1": "be kind", "own": "mine"}


def test_a_local_data_set(tmp_path):
    from datasets import Dataset

    Dataset.from_list(GOOD).save_to_disk(tmp_path / "data")
    assert prepare(Run(tmp_path / "run"), PrepareConfig(inputs=[str(tmp_path / "data")]), 0.01)["done"] == 20


def test_line_separators_inside_a_text_stay_inside(tmp_path):
    """U+2028, U+2029 and U+0085 end a line for str.splitlines, not for JSON."""
    text = "one\u2028two\u2029three\u0085four\x0bfive"
    run = Run(tmp_path / "run")
    rows = [{"id": "web", "conversations": [user(text)]}]
    prepare(run, PrepareConfig(inputs=[write(tmp_path / "rows.jsonl", rows)], eval_share=0.0), 0.01)
    assert read_unit(run, run.read_plan().units[0])[0].messages[0].content == text


def test_max_rows_leaves_the_held_out_share_as_it_is(tmp_path):
    rows = [{"id": f"r{i}", "conversations": [user(f"q{i}")]} for i in range(2000)]
    source = write(tmp_path / "rows.jsonl", rows)
    summary = prepare(Run(tmp_path / "run"), PrepareConfig(inputs=[source], max_rows=400, eval_share=0.1), 0.01)
    assert 20 <= summary["eval"] <= 60 and summary["train"] + summary["eval"] == 400
