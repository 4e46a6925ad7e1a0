"""Trackers: what DeepSpeed's monitor is told, and that it writes it; its csv files are the real part that needs no package."""

import csv
import json
from importlib import util

import pytest

from eagle3_offline.config import load_recipe
from eagle3_offline.records import UserError
from eagle3_offline.runs import Run
from eagle3_offline.training.engine import deepspeed_json
from eagle3_offline.training.metrics import read_metrics
from eagle3_offline.training.trackers import monitor_json, numbers, require_packages


def test_deepspeeds_monitor_writes_every_steps_and_evaluations_values(copied):
    copied.stage("train", "--set", "tracking.trackers=csv", "--set", "train.total_steps=4", "--set", "train.eval_every=2")
    folder = Run(copied.run).draft("draft")
    with open(folder / "tracking" / "train_loss.csv") as handle:
        header, *lines = csv.reader(handle)
    assert header == ["step", "loss"]
    lines = [(int(step), float(loss)) for step, loss in lines]
    assert lines == [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.csv")]
    with open(folder / "tracking" / "held_out_tau.csv") as handle:
        taus = [float(line[1]) for line in list(csv.reader(handle))[1:]]
    assert taus == [json.loads(line)["tau"] for line in (folder / "held_out.jsonl").read_text().splitlines()]


def test_what_the_monitor_is_told(tmp_path):
    """As DeepSpeed's own parser reads it; no key is among it."""
    from deepspeed.monitor.config import get_monitor_config

    recipe = load_recipe(None, ("name=big", "train.draft=first", "tracking.trackers=[tensorboard, wandb, comet]", "tracking.project=ours"))
    found = get_monitor_config(monitor_json(recipe, tmp_path))
    assert found.enabled and not found.csv_monitor.enabled
    assert (found.tensorboard.output_path, found.tensorboard.job_name) == (str(tmp_path), "tracking")
    assert (found.wandb.project, found.wandb.group) == ("ours", "big-first")
    assert (found.comet.project, found.comet.experiment_name, found.comet.api_key) == ("ours", "big-first", None)
    assert found.comet.samples_log_interval == 1  # of steps: every one


@pytest.mark.parametrize("tracker, package", [("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_said_before_the_training(tracker, package, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    recipe = load_recipe(None, (f"tracking.trackers={tracker}",))
    with pytest.raises(UserError, match=f"whose package {package} is not installed"):
        require_packages(recipe)


def test_a_key_in_the_deepspeed_json_is_refused(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"comet": {"enabled": True, "api_key": "secret"}}))
    with pytest.raises(UserError, match="set COMET_API_KEY instead") as caught:
        deepspeed_json(load_recipe(None, (f"train.deepspeed={tmp_path}/own.json", "train.dtype=float32")).train)
    assert "secret" not in str(caught.value)


def test_lists_are_taken_apart_and_texts_left_out():
    values = {"step": 4, "tau": 2.0, "alpha": [0.5, None], "teacher": "last states"}
    assert numbers(values) == [("tau", 2.0), ("alpha_0", 0.5)]
