"""tokens/unit-*.parquet: conversations as the engine's own token ids. Written whole; its presence means done.

One row a conversation, under its id; several, under ID#0, ID#1, ..., where later turns do not see the earlier ones as they were
generated (see `regenerate.reasoning`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..records import TokenRow, UserError
from ..runs import Plan, Run, Unit, atomic_path, unit_name

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("turns", pa.list_(pa.list_(pa.int32()))),  # [start, end) of each answer
        ("finish_reason", pa.list_(pa.string())),  # of each answer
    ]
)


def write_token_rows(path: Path, rows: list[TokenRow]) -> None:
    columns = {
        "id": [row.id for row in rows],
        "source": [row.source for row in rows],
        "split": [row.split for row in rows],
        "input_ids": [row.input_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        "turns": [[list(turn) for turn in row.turns] for row in rows],
        "finish_reason": [list(row.finish_reasons) for row in rows],
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary, compression="zstd")


def read_token_rows(path: Path) -> list[TokenRow]:
    """Raises UserError for a file that is missing, damaged or inconsistent."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: run `regenerate` for this unit first")
    try:
        table = pq.read_table(path, schema=SCHEMA).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run `regenerate` for this unit again") from None
    rows = []
    for v in table:
        if lacking := [name for name in SCHEMA.names if v[name] is None]:
            raise UserError(f"{path} lacks {', '.join(lacking)} of row {v['id']!r}; expected the columns {', '.join(SCHEMA.names)}")
        turns = tuple((start, end) for start, end in v["turns"])
        row = TokenRow(v["id"], v["source"], v["split"], np.array(v["input_ids"], np.int32), turns, tuple(v["finish_reason"]))
        if not np.array_equal(row.loss_mask, v["loss_mask"]):
            raise UserError(f"{path}: row {row.id}: loss_mask is not the union of its turns {turns}")
        rows.append(row)
    return rows


def token_row_ids(run: Run, unit: Unit) -> tuple[str, ...]:
    """Ids of the token rows of a unit's conversations, in planned order; a conversation that has none stands for itself."""
    if not run.tokens(unit.unit).is_file():
        return unit.rows
    found: dict[str, list[str]] = {name: [] for name in unit.rows}
    for name in pq.read_table(run.tokens(unit.unit), columns=["id"])["id"].to_pylist():
        conversation = name if name in found else name.rpartition("#")[0]
        if conversation in found:
            found[conversation].append(name)
    return tuple(name for planned, names in found.items() for name in names or [planned])


def plan_of_token_rows(run: Run) -> Plan:
    """The work units of a run whose tokens/unit-*.parquet came from elsewhere: as the files say. Written as the run's plan."""
    files = sorted(run.tokens(0).parent.glob("unit-*.parquet"))
    if [path.stem for path in files] != [unit_name(number) for number in range(len(files))] or not files:
        names = ", ".join(path.name for path in files[:4]) or "no files"
        raise UserError(f"{run.tokens(0).parent} has {names}; expected unit-00000.parquet and so on, without a gap (or run `prepare`)")
    units, seen = [], {}
    for number, path in enumerate(files):
        rows = read_token_rows(path)
        if not rows:
            raise UserError(f"{path} holds no rows: remove it, and number the others without a gap")
        if len(splits := {row.split for row in rows}) != 1:
            raise UserError(f"{path} mixes the splits {sorted(splits)}; a unit holds one")
        for row in rows:
            if row.id in seen:
                raise UserError(f"row {row.id} is in {seen[row.id].name} and in {path.name}; each id may come once")
            seen[row.id] = path
        units.append(Unit(number, rows[0].split, tuple(row.id for row in rows)))
    plan = Plan(tuple(units), {})
    run.write_plan(plan)
    return plan


def answer_tokens(path: Path) -> int | None:
    """Tokens of all answers of a unit; None while it is not regenerated."""
    if not path.is_file():
        return None
    masks = pq.read_table(path, columns=["loss_mask"])["loss_mask"].combine_chunks()
    return int(np.sum(masks.flatten().to_numpy(zero_copy_only=False)))
