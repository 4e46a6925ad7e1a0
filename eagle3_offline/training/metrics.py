"""metrics.csv (a line a step), held_out.jsonl (a line an evaluation) and skipped.jsonl of a draft; all continue exactly after a resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ..runs import append_jsonl, continue_jsonl, write_text
from .trackers import Trackers


class Metrics:
    """Appends lines; what lies beyond the step that training resumes from is dropped, since it is computed again."""

    def __init__(self, folder: Path, resumed_step: int, trackers: Trackers):
        self.trackers = trackers
        self.steps, self.held_out, self.skips = folder / "metrics.csv", folder / "held_out.jsonl", folder / "skipped.jsonl"
        if self.steps.is_file() and self.steps.stat().st_size == 0:
            self.steps.unlink()  # a kill before the first line
        if self.steps.is_file():
            header, *lines = self.steps.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(self.steps, "".join([header, *lines[:resumed_step]]))
        for path in (self.held_out, self.skips):
            continue_jsonl(path, lambda value: 0 < resumed_step >= value["step"])

    def step(self, values: dict[str, Any]) -> None:
        new = not self.steps.is_file()
        with open(self.steps, "a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, values)
            if new:
                writer.writeheader()
            writer.writerow(values)
        self.trackers.write("train", values)

    def evaluation(self, values: dict[str, Any]) -> None:
        append_jsonl(self.held_out, values)
        self.trackers.write("held_out", values)

    def skipped(self, values: dict[str, Any]) -> None:
        append_jsonl(self.skips, values)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.csv as numbers."""
    with open(path, newline="", encoding="utf-8") as handle:
        return [{key: float(value) for key, value in line.items()} for line in csv.DictReader(handle)]
