"""Trackers: every step's and evaluation's values to tensorboard, wandb, comet or csv files, through DeepSpeed's monitor.

A monitor of our own beside the engine's, which would add its own values at other places of the axis; here the axis is optimiser steps.
"""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..records import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # csv needs none
NO_VALUES = ("step",)


def monitor_json(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The sections of a DeepSpeed JSON for the recipe's trackers. No key is in them: wandb and comet read the environment."""
    tracking = recipe.tracking
    name = tracking.run_name or f"{recipe.name}-{recipe.train.draft}"
    files = {"enabled": True, "output_path": str(folder), "job_name": "tracking"}
    known = {
        "tensorboard": {"tensorboard": files},
        "csv": {"csv_monitor": files},
        "wandb": {"wandb": {"enabled": True, "project": tracking.project, "group": name}},  # the parts of a resumed run stand together
        "comet": {"comet": {"enabled": True, "project": tracking.project, "experiment_name": name, "samples_log_interval": 1}},
    }
    return {section: value for tracker in tracking.trackers for section, value in known[tracker].items()}


def require_packages(recipe: Recipe) -> None:
    """UserError where a tracker's package is not installed."""
    for tracker in recipe.tracking.trackers:
        package = PACKAGES.get(tracker)
        if package and util.find_spec(package) is None:
            raise UserError(
                f"tracking.trackers names {tracker}, whose package {package} is not installed: "
                f"pip install 'eagle3-offline[trackers]', or leave it out"
            )


class Trackers:
    """Hands values on, from rank 0 alone; does nothing where the recipe names no tracker. Needs the process group."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.monitor = None
        if not recipe.tracking.trackers:
            return
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        sections = monitor_json(recipe, folder)
        if "wandb" in sections:  # DeepSpeed passes no run name on
            os.environ.setdefault("WANDB_NAME", sections["wandb"]["group"])
        self.monitor = MonitorMaster(get_monitor_config(sections))

    def write(self, group: str, values: dict[str, Any]) -> None:
        """The numbers among a step's values as GROUP/NAME; of a list each item as GROUP/NAME_i."""
        if self.monitor is not None:
            self.monitor.write_events([(f"{group}/{name}", value, values["step"]) for name, value in numbers(values)])


def numbers(values: dict[str, Any]) -> list[tuple[str, float]]:
    """Name and number of all that are numbers."""
    found = []
    for name, value in values.items():
        items = [(f"{name}_{i}", item) for i, item in enumerate(value)] if isinstance(value, list) else [(name, value)]
        found += [(name, float(item)) for name, item in items if isinstance(item, int | float) and name not in NO_VALUES]
    return found
