"""Progress of a stage: a live bar on a terminal, plain lines in a log. Rows and tokens per second, and the time left."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LOG_INTERVAL = 10.0  # seconds between plain lines


class StageProgress:
    """Counts rows (or steps) and tokens; a context manager. Everything goes to stderr, so that --json owns stdout."""

    def __init__(self, title: str, total: int, noun: str = "rows"):
        self.title, self.total, self.noun = title, total, noun
        self.rows = self.tokens = 0
        self.note = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error[0] is None and self.rows:
            print(f"{self.title}: {self._text()}", file=sys.stderr, flush=True)

    def advance(self, rows: int, tokens: int, note: str = "") -> None:
        """`rows` more rows with `tokens` tokens are done; `note` is shown behind the numbers."""
        self.rows, self.tokens, self.note = self.rows + rows, self.tokens + tokens, note or self.note
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.rows, text=self._text())
        elif now - self._last_line >= LOG_INTERVAL:
            self._last_line = now
            print(f"{self.title}: {self._text()}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        left = seconds / self.rows * (self.total - self.rows) if self.rows else float("inf")
        pace = f"{self.rows / seconds:.1f} {self.noun}/s, {self.tokens / seconds:,.0f} tokens/s"
        return f"{self.rows:,}/{self.total:,} {self.noun}, {pace}, {_duration(left)} left{self.note and ', ' + self.note}"


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
