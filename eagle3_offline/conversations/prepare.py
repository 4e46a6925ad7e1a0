"""The stage `prepare`: inputs to conversations in work units, split by the hash of each row's group."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from ..config import PrepareConfig
from ..records import Conversation, Message, Reject, Summary, UserError
from ..runs import Plan, Run, Unit, check_rejected, digest, read_jsonl, write_jsonl
from .load import load


def prepare(run: Run, config: PrepareConfig, max_rejected: float) -> Summary:
    """Write conversations/unit-*.jsonl and, last, plan.json. A second run with the same inputs and settings changes nothing."""
    rows, rejects = _read(config.inputs)
    held_out, more = _read(config.eval_inputs)
    rejects += more
    rows, held_out = _in_order(rows), _in_order(held_out)
    rows, held_out, repeated = _unique(rows, held_out)
    rejects += repeated
    if config.max_rows is not None:
        rows = rows[: config.max_rows]
    train, evaluation = (rows, held_out) if config.eval_inputs else _split(rows, config)
    if not train:
        raise UserError(
            f"prepare: no row is left to train on (inputs {config.inputs}, {len(rejects)} rejected, {len(evaluation)} held out)"
        )
    content = hashlib.sha256(
        "".join(_line(row, split) for split, part in (("train", train), ("eval", evaluation)) for row in part).encode()
    ).hexdigest()
    run.claim("prepare", {**dataclasses.asdict(config), "content": content})
    units = _units(train, evaluation, config.unit_rows)
    if not run.plan_path.is_file():
        for unit, part in units:
            write_jsonl(run.conversations(unit.unit), (_to_json(_with_system(row, config.system_prompt)) for row in part))
        run.write_rejects("prepare", None, rejects)
        limits = {"unit_rows": config.unit_rows, "answer_tokens": config.answer_tokens}
        run.write_plan(Plan(tuple(unit for unit, _ in units), limits))
    done = len(train) + len(evaluation)
    check_rejected("prepare", done, len(rejects), max_rejected, run.errors("prepare"))
    return {
        "done": done,
        "rejected": len(rejects),
        "train": len(train),
        "eval": len(evaluation),
        "units": len(units),
        "content": digest(content),
    }


def read_unit(run: Run, unit: Unit) -> list[Conversation]:
    """The conversations of a unit, in the plan's order."""
    rows = [
        Conversation(v["id"], tuple(Message(**m) for m in v["conversations"]), v["source"], v["group"])
        for v in read_jsonl(run.conversations(unit.unit))
    ]
    if tuple(row.id for row in rows) != unit.rows:
        raise UserError(
            f"{run.conversations(unit.unit)} holds other rows than plan.json names for unit {unit.unit}: was it changed by hand?"
        )
    return rows


def _read(sources: list[str]) -> tuple[list[Conversation], list[Reject]]:
    rows: list[Conversation] = []
    rejects: list[Reject] = []
    for source in sources:
        for row in load(source):
            (rows if isinstance(row, Conversation) else rejects).append(row)
    return rows, rejects


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _in_order(rows: list[Conversation]) -> list[Conversation]:
    """By the hash of the group, then of the id: an order that no input's own order shows through."""
    return sorted(rows, key=lambda row: (_hash(row.group), _hash(row.id)))


def _unique(*parts: list[Conversation]) -> tuple[list[Conversation], list[Conversation], list[Reject]]:
    """The parts without rows whose id came before."""
    seen: set[str] = set()
    kept: list[list[Conversation]] = [[], []]
    rejects = []
    for number, part in enumerate(parts):
        for row in part:
            if row.id in seen:
                rejects.append(Reject("the id (or, for rows without one, the content) occurs twice", id=row.id, file=row.source))
            else:
                seen.add(row.id)
                kept[number].append(row)
    return kept[0], kept[1], rejects


def _split(rows: list[Conversation], config: PrepareConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Hold out whole groups: the first eval_rows groups in hash order, or those whose hash falls into the share."""
    if config.eval_rows is not None:
        held_out = set(list(dict.fromkeys(row.group for row in rows))[: config.eval_rows])
    else:
        # not the hash that orders the rows: max_rows would then cut off the train rows first
        held_out = {row.group for row in rows if int(_hash(f"split {row.group}")[:13], 16) / 16**13 < config.eval_share}
    return [row for row in rows if row.group not in held_out], [row for row in rows if row.group in held_out]


def _units(train: list[Conversation], evaluation: list[Conversation], size: int) -> list[tuple[Unit, list[Conversation]]]:
    pieces = [("train", train[i : i + size]) for i in range(0, len(train), size)]
    pieces += [("eval", evaluation[i : i + size]) for i in range(0, len(evaluation), size)]
    return [(Unit(number, split, tuple(row.id for row in part)), part) for number, (split, part) in enumerate(pieces)]


def _with_system(row: Conversation, system_prompt: str | None) -> Conversation:
    if system_prompt is None or row.messages[0].role == "system":
        return row
    return dataclasses.replace(row, messages=(Message("system", system_prompt), *row.messages))


def _to_json(row: Conversation) -> dict[str, object]:
    return {"id": row.id, "conversations": [dataclasses.asdict(m) for m in row.messages], "source": row.source, "group": row.group}


def _line(row: Conversation, split: str) -> str:
    return json.dumps([split, _to_json(row)], ensure_ascii=True) + "\n"
