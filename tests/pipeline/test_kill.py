"""kill -9 at random moments, then run again: the same rows, bytes and weights as an uninterrupted run."""

import random
import signal
import subprocess
import sys

from eagle3_offline.runs import Run, read_json
from eagle3_offline.training.metrics import read_metrics

from ..small_runs import conversations, own_environment, write_recipe

KILLS = 4  # `make soak` of a later issue raises it
DEMO = """
import sys
from eagle3_offline.config import load_recipe
from eagle3_offline.pipeline import Demo
from eagle3_offline.runs import Run, StopSignal
with StopSignal() as stop:
    Demo(Run(sys.argv[2]), load_recipe(sys.argv[1]), stop).perform()
"""


def start(recipe, run):
    command = [sys.executable, "-c", DEMO, str(recipe), str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own_environment())


def outcome(folder):
    """Everything that must be equal: tokens, part digests, dump digest, losses, the exported weights."""
    run = Run(folder)
    units = [unit.unit for unit in run.read_plan().units]
    return {
        "tokens": [run.tokens(unit).read_bytes() for unit in units],
        "dump": read_json(run.dump / "dump.json")["digest"],
        "losses": [line["loss"] for line in read_metrics(run.draft("draft") / "metrics.csv")],
        "export": (run.draft("draft") / "export" / "model.safetensors").read_bytes(),
        "decoded": [answer["speculative"] for answer in read_json(run.draft("draft") / "decoded.json")["answers"]],
    }


def test_kills_at_random_moments_change_nothing(random_target, tmp_path):
    recipe = write_recipe(tmp_path, random_target, conversations(24), regenerate={"max_tokens": 16}, train={"checkpoint_every": 2})
    whole = start(recipe, tmp_path / "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    rng = random.Random(0)
    stages = ["== regenerate", "== dump-hidden", "== train", "== decode"]
    for kill in range(KILLS):
        process = start(recipe, tmp_path / "killed")
        for line in process.stdout:  # up to a stage, then a random moment within it
            if line.startswith(stages[kill % len(stages)]):
                break
        try:
            process.wait(rng.uniform(0.1, 2.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start(recipe, tmp_path / "killed")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
