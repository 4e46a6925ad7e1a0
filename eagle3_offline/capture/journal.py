"""What is finished of a unit that is not: one line a dialogue, appended as they end, so that a kill loses the unfinished ones only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ..conversations.token_rows import read_token_rows
from ..records import Message, Reject, TokenRow
from ..runs import Run, Unit, continue_jsonl, read_jsonl, unit_name, write_jsonl
from .dialogues import Answered, Dialogue


def journal_path(run: Run, unit: int) -> Path:
    """Beside the file that it becomes."""
    return run.tokens(unit).with_name(f".{unit_name(unit)}.journal.jsonl")


class Journal:
    """Context manager: takes over what an earlier attempt at the unit left, then appends."""

    def __init__(self, path: Path):
        self.path = path
        self.found = {line["id"]: line for line in continue_jsonl(path)}  # a torn last line is dropped

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def restore(self, dialogue: Dialogue) -> bool:
        """Give a new dialogue the end that it had before; whether it had one."""
        line = self.found.get(dialogue.row.id)
        if line is None:
            return False
        dialogue.pending = []
        dialogue.answered = [
            Answered(row["ids"], [(start, end) for start, end in row["turns"]], row["finish_reasons"]) for row in line["rows"]
        ]
        dialogue.history = [Message(**message) for message in line["history"]]
        dialogue.reject = Reject(**line["reject"]) if line["reject"] else None
        return True

    def add(self, dialogue: Dialogue) -> None:
        """Note that a dialogue is over, answered or rejected."""
        reject = dataclasses.asdict(dialogue.reject) if dialogue.reject else None
        history = [dataclasses.asdict(message) for message in dialogue.history]
        line = {"id": dialogue.row.id, "rows": list(map(dataclasses.asdict, dialogue.answered)), "history": history, "reject": reject}
        self._handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._handle.flush()


def reopen(run: Run, unit: Unit, stage: str) -> int:
    """Turn a finished unit back into a journal without the rejects that a retry can help; how many these are.

    Nothing changes where there are none. The journal is whole before the unit stops being finished.
    """
    rejects = run.read_rejects(stage, unit.unit)
    again = sum(reject.retry for reject in rejects)
    if again:
        rows = iter(read_token_rows(run.tokens(unit.unit)))
        lines = [
            {"id": text["id"], "rows": _rows_of(text["conversations"], rows), "history": text["conversations"], "reject": None}
            for text in read_jsonl(run.regenerated(unit.unit))
        ]
        lines += [
            {"id": reject.id, "rows": [], "history": [], "reject": dataclasses.asdict(reject)} for reject in rejects if not reject.retry
        ]
        write_jsonl(journal_path(run, unit.unit), lines)
        run.tokens(unit.unit).unlink()
    return again


def _rows_of(messages: list[dict[str, str]], rows: Iterator[TokenRow]) -> list[dict[str, Any]]:
    """The next token rows, as many as hold this conversation's answers: both files are in the same order."""
    left, found = sum(message["role"] == "assistant" for message in messages), []
    while left > 0:
        row = next(rows)
        found.append({"ids": row.input_ids.tolist(), "turns": row.turns, "finish_reasons": row.finish_reasons})
        left -= len(row.turns)
    return found
