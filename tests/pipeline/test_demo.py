"""The demo on the tiny target: every stage for real, what must hold, the page in a real browser."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest

from ..small_runs import demo


@pytest.fixture(scope="session")
def report(tiny_demo):
    return json.loads((tiny_demo / "report.json").read_text())


@pytest.mark.timeout(1800)  # the fixture runs the whole demo
def test_what_must_hold(report):
    decoded, held_out = report["decoded"], report["held_out"]
    assert decoded["answers"] == 48 and decoded["identical"] == 48
    assert abs(decoded["walk_tau"] - decoded["tau"]) <= 0.01
    assert held_out["answers"] == 200 and held_out["tau"] >= 2.5
    assert held_out["first_root_hit"] >= 0.85
    assert report["untrained_tau"] <= 1.05
    assert all(check["holds"] for check in report["checks"])


def test_the_report_holds_what_a_reader_wants(report):
    held = report["held_out"]
    difference, low, high = held["over_ngram"]
    assert difference == pytest.approx(held["tau"] - held["ngram_tau"])
    assert low < difference < high
    assert held["ngram_tau"] > 1 and report["tokens"] > 0 and report["bytes_per_token"] < report["raw_bytes_per_token"]
    assert {stage["stage"] for stage in report["stages"]} == {
        "target", "prepare", "regenerate", "dump-hidden", "train", "evaluate", "export", "decode",
    }  # fmt: skip
    for name, counts in report["rows"].items():
        assert counts["rejected"] <= 0.01 * (counts["done"] + counts["rejected"]), name


def test_no_held_out_subject_was_trained_on(tiny_demo):
    subjects = {"train": set(), "eval": set()}
    plan = json.loads((tiny_demo / "plan.json").read_text())
    for unit in plan["units"]:
        rows = (tiny_demo / "conversations" / f"unit-{unit['unit']:05d}.jsonl").read_text().splitlines()
        subjects[unit["split"]] |= {json.loads(row)["group"] for row in rows}
    assert len(subjects["eval"]) == 200 and not subjects["train"] & subjects["eval"]


def test_a_second_run_redoes_nothing(tiny_demo, report):
    watched = [*tiny_demo.glob("tokens/*"), *tiny_demo.glob("dump/parts/*/part.json"), *tiny_demo.glob("drafts/demo/*.json")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    started = time.monotonic()
    done = demo(tiny_demo)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    assert time.monotonic() - started < 120
    again = json.loads((tiny_demo / "report.json").read_text())
    assert again["stages"] == report["stages"] and again["decoded"] == report["decoded"]


def test_the_page_in_a_browser(tiny_demo, browser, tmp_path):
    """Rendered by a real browser, offline: curves, three answers with accepted and rejected drafts, the toy's warning."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    command += ["--no-first-run", "--disable-sync", f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000", "--dump-dom"]
    page = (tiny_demo / "report.html").resolve()
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    dom = done.stdout
    assert dom.count("<svg") == 2 and dom.count('class="answer"') == 6  # a prompt and an answer, three times
    assert 'class="hit"' in dom and 'class="bonus"' in dom and "prove the plumbing only" in dom
    assert not re.search(r'(src|href)="https?:|url\(.?https?:', dom)  # nothing is loaded from elsewhere
    for word in ("n-gram lookup", "untrained", "walk", "bytes a token"):
        assert word in dom


@pytest.fixture(scope="session")
def browser(require):
    path = shutil.which("chromium") or shutil.which("google-chrome")
    require("browser", path is not None, "no chromium here")
    return path


def test_environment_is_offline():
    assert os.environ.get("HF_HUB_OFFLINE") == "1"  # tests/conftest.py sets it: tests never ask the hub
