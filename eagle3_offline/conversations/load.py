"""Inputs to conversations: JSONL files, hub or local data sets, or questions about the standard library.

A row is {"id", "conversations": [{"role", "content"}]} ("messages" is read too); "id", "source" and "group" are optional.
What is wrong with a row becomes a Reject with file, line and reason; the others go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records import Conversation, Message, Reject, UserError
from .stdlib_questions import questions

ROLES = ("system", "user", "assistant")


def load(source: str) -> Iterator[Conversation | Reject]:
    """All rows of one input, in its order. Raises UserError for an input that is not there."""
    path = Path(source)
    if source == "stdlib":
        yield from questions()
    elif path.suffix in (".jsonl", ".json") or path.is_file():
        if not path.is_file():
            raise UserError(f"prepare.inputs: {source} does not exist (looked from {Path.cwd()})")
        yield from _load_jsonl(path)
    else:
        yield from _load_dataset(source)


def _load_jsonl(path: Path) -> Iterator[Conversation | Reject]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield Reject(f"not valid JSON: {error}", file=str(path), line=number)
                continue
            yield parse_row(row, path.stem, str(path), number)


def _load_dataset(source: str) -> Iterator[Conversation | Reject]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        data = load_from_disk(source) if Path(source).is_dir() and not list(Path(source).glob("*.jsonl")) else load_dataset(source)
    except (FileNotFoundError, ValueError, ConnectionError, OSError) as error:
        raise UserError(
            f"prepare.inputs: {source!r} is neither a JSONL file, `stdlib`, nor a data set that could be loaded: {error}"
        ) from None
    if isinstance(data, DatasetDict):
        if "train" not in data:
            raise UserError(f"prepare.inputs: {source!r} has the splits {sorted(data)} but no `train`")
        data = data["train"]
    for number, row in enumerate(data, start=1):
        yield parse_row(row, source, source, number)


def parse_row(row: Any, source: str, file: str, line: int) -> Conversation | Reject:
    """One raw row, checked."""
    name = str(row["id"]) if isinstance(row, dict) and row.get("id") not in (None, "") else None
    reason = _problem(row)
    if reason:
        return Reject(reason, id=name, file=file, line=line)
    raw = row.get("conversations") or row.get("messages")
    messages = tuple(Message(message["role"], message["content"]) for message in raw)
    content = content_hash(messages)
    return Conversation(name or content[:16], messages, str(row.get("source") or source), str(row.get("group") or content))


def content_hash(messages: tuple[Message, ...]) -> str:
    """Digest of what was said, by whom, in which order."""
    text = json.dumps([(message.role, message.content) for message in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _problem(row: Any) -> str | None:
    """What is wrong with a raw row, None if nothing."""
    if not isinstance(row, dict):
        return f"the row is a {type(row).__name__}, expected an object with `conversations`"
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return f"text that is not valid Unicode: {error.reason}"
    messages = row.get("conversations") or row.get("messages")
    if not messages:
        return "empty conversation: no `conversations` (or `messages`), or an empty list"
    if not isinstance(messages, list):
        return f"`conversations` is a {type(messages).__name__}, expected a list"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            return f'message {number} is {str(message)[:80]!r}, expected {{"role": system|user|assistant, "content": text}}'
        if not message["content"].strip() and message["role"] != "system":
            return f"message {number} ({message['role']}) is empty"
    return _order_problem([message["role"] for message in messages])


def _order_problem(roles: list[str]) -> str | None:
    turns = roles[1:] if roles[0] == "system" else roles
    if "user" not in turns:
        return "no user turn: there is nothing for the target to answer, so no assistant turn can be made"
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if turns != expected:
        return f"roles are {', '.join(roles)}; expected an optional system message, then user and assistant in turns"
    return None
