"""The run folder: atomic writes, the plan, settings that a stage is bound to, signals."""

import os
import signal

import pytest

from eagle3_offline import runs
from eagle3_offline.records import Stopped, TooManyRejected, UserError
from eagle3_offline.runs import Plan, Run, SettingsChanged, StopSignal, Unit, atomic_folder, check_rejected, parse_units


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "half").touch()
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]


def test_the_first_of_two_publishers_wins(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "model") as slow:
        (slow / "slow").touch()
        monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
        with atomic_folder(tmp_path / "model") as fast:
            (fast / "fast").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "fast"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    runs.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), runs.atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("{half")
        raise RuntimeError("killed")
    assert runs.read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert runs.continue_jsonl(path) == []
    runs.append_jsonl(path, {"step": 1})
    runs.append_jsonl(path, {"step": 2})
    with open(path, "a") as handle:
        handle.write('{"step": 3')  # a kill in the middle of a line
    assert runs.continue_jsonl(path, lambda value: value["step"] < 2) == [{"step": 1}]
    runs.append_jsonl(path, {"step": 2})
    assert runs.read_jsonl(path) == [{"step": 1}, {"step": 2}]


def plan(limit):
    units = [Unit(i, "train", (f"r{i}",)) for i in range(4)] + [Unit(4, "eval", ("e",))]
    return Plan(tuple(units), {"answer_tokens": limit})


def test_the_plan_round_trips_and_refuses_another_version(tmp_path):
    run = Run(tmp_path)
    run.write_plan(plan(100))
    assert run.read_plan() == plan(100)
    value = runs.read_json(run.plan_path)
    runs.write_json(run.plan_path, {**value, "version": 9})
    with pytest.raises(UserError, match="version 9"):
        run.read_plan()


@pytest.mark.parametrize(
    "limit, done, needed",
    [
        (None, {}, [0, 1, 2, 3, 4]),
        (100, {0: 60, 1: 60}, [0, 1, 4]),  # reached within unit 1: units 2 and 3 are spare
        (100, {0: 60}, [0, 1, 2, 3, 4]),  # not reached yet
        (100, {0: 100}, [0, 4]),
        (100, {1: 500}, [0, 1, 4]),
    ],
)
def test_units_beyond_the_answer_limit_are_spare(limit, done, needed):
    assert [unit.unit for unit in plan(limit).needed(lambda unit: done.get(unit.unit))] == needed


def test_units_on_the_command_line():
    assert parse_units("3,7-9") == [3, 7, 8, 9] and parse_units(None) is None
    for wrong in ("a", "3-", "-1", "1,,2"):
        with pytest.raises(UserError, match="expected numbers and ranges"):
            parse_units(wrong)
    with pytest.raises(UserError, match="units 0 to 4"):
        plan(None).select([2, 5])


def test_outputs_are_bound_to_their_settings(tmp_path):
    run = Run(tmp_path)
    first = run.claim("dump", {"layers": (2, 4), "codec": "lossless"})
    assert run.claim("dump", {"layers": [2, 4], "codec": "lossless"}) == first
    with pytest.raises(SettingsChanged, match="codec was 'lossless', is now 'none'"):
        run.claim("dump", {"layers": [2, 4], "codec": "none"})
    run.discard("dump")
    run.claim("dump", {"codec": "none"})


def test_too_many_rejected(tmp_path):
    check_rejected("dump", 99, 1, 0.01, tmp_path)
    with pytest.raises(TooManyRejected, match="2 of 100 rows were rejected, 2.0%"):
        check_rejected("dump", 98, 2, 0.01, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_remembered_until_a_good_moment(number):
    with StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=signal.Signals(number).name):
            stop.check()
    assert signal.getsignal(number) != stop._remember
