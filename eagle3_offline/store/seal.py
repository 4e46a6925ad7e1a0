"""Seals a dump: checks that every planned row is accounted for, writes the row table and the statistics, the manifest last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..records import SPLITS, UserError
from ..runs import digest, unit_name
from .files import check, record_of, tensor_bytes
from .format import (
    FORMAT_VERSION,
    MANIFEST,
    PART_JSON,
    ROWS,
    STATISTICS,
    TARGET,
    DumpSpec,
    check_same_spec,
    json_bytes,
    with_digest,
)
from .part import Part
from .places import Place, place
from .target_files import BASIS, INDEX, read_index

PlannedUnit = tuple[int, str, tuple[str, ...]]  # unit number, split, planned row ids
_NAMED_ROWS = 10  # how many ids an error lists


def part_place(dump: Place | Path | str, unit: int) -> Place:
    return place(dump) / "parts" / unit_name(unit)


def sealed(dump: Place | Path | str, unit: int) -> bool:
    """Whether the unit's part is there, whole."""
    return (part_place(dump, unit) / PART_JSON).size() is not None


def missing_units(dump: Place | Path | str, units: Iterable[PlannedUnit]) -> list[int]:
    """Numbers of the units that have no sealed part yet."""
    return [unit for unit, _, _ in units if not sealed(dump, unit)]


def seal(
    dump: Place | Path | str, spec: DumpSpec, units: Sequence[PlannedUnit], allow_partial: bool = False, missing: Sequence[str] = ()
) -> dict[str, Any]:
    """Publish the sealed parts of `units` as one dump and return its manifest. The same parts give the same manifest.

    missing: ids of rows that the dumps had lost that this one is made of; the manifest goes on naming them.
    """
    dump = place(dump)
    units = sorted(units)
    _check_no_id_twice(units)
    target = _target_records(dump, spec)
    table = _Table(spec)
    for unit in units:
        table.add_unit(dump, *unit)
    if table.missing and not allow_partial:
        raise UserError(_gap_text(dump, table))
    table.missing = [*missing, *table.missing]
    tables = {ROWS: tensor_bytes(table.columns()), STATISTICS: tensor_bytes(table.statistics())}
    for name, data in tables.items():
        (dump / name).write(data)
    manifest = table.manifest({name: record_of(data) for name, data in tables.items()} | target)
    (dump / MANIFEST).write(json_bytes(manifest))
    return manifest


def _check_no_id_twice(units: Sequence[PlannedUnit]) -> None:
    seen: dict[str, int] = {}
    for unit, _, ids in units:
        for name in ids:
            if name in seen:
                raise UserError(f"row {name} is planned in unit {seen[name]} and in unit {unit}; each id may come once: mend the plan")
            seen[name] = unit


def _target_records(dump: Place, spec: DumpSpec) -> dict[str, dict[str, Any]]:
    """Path in the dump -> record of every file in `target/`, each verified."""
    records = {f"{TARGET}/{name}": record for name, record in read_index(dump).items()}
    for name, record in records.items():
        check(dump / name, record)
    if spec.compact and records.get(f"{TARGET}/{BASIS}", {}).get("xxh3_128") != spec.compact.basis:
        raise UserError(f"{dump / TARGET / BASIS} is not the basis that the parts were projected with: restore it, or dump again")
    return records | {f"{TARGET}/{INDEX}": record_of((dump / TARGET / INDEX).read())}


def _gap_text(dump: Place, table: _Table) -> str:
    ids = ", ".join(table.missing[:_NAMED_ROWS]) + (", ..." if len(table.missing) > _NAMED_ROWS else "")
    units = ",".join(str(unit) for unit in table.incomplete)
    return (
        f"{dump}: {len(table.missing)} planned rows are neither done nor rejected ({ids}), in units {units}. Dump these units "
        f"(remove a sealed part that lacks rows first), or seal what is there with --allow-partial"
    )


@dataclass
class _Table:
    """The row table while parts are added to it."""

    spec: DumpSpec
    rows: list[tuple[int, ...]] = field(default_factory=list)  # part, row, token_offset, length, supervised, split, source
    ids: list[str] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)  # name -> code
    missing: list[str] = field(default_factory=list)  # row ids
    incomplete: list[int] = field(default_factory=list)  # units with missing rows

    def __post_init__(self) -> None:
        self._token_counts = np.zeros(self.spec.vocab_size, np.int64)  # [V]
        self._sumsq = {name: np.zeros(self.spec.aux_width, np.float64) for name in self.spec.aux_arrays}
        self._sumsq_tokens = dict.fromkeys(self._sumsq, 0)

    def add_unit(self, dump: Place, unit: int, split: str, planned: Sequence[str]) -> None:
        """Add a unit's part, its rows in planned order."""
        if not sealed(dump, unit):
            self._record_gap(unit, planned)
            return
        folder = part_place(dump, unit)
        part = Part(folder, self.spec)
        content = part.content
        self._check_part(folder, content, unit, split, planned)
        places = {row["id"]: number for number, row in enumerate(content["rows"])}
        if part.offsets.tolist() != np.cumsum([0, *(row["tokens"] for row in content["rows"])]).tolist():
            raise UserError(f"{folder}: its offsets are not those of the rows in {PART_JSON}; remove it and dump its unit again")
        rejected = {reject["id"] for reject in content["rejects"]}
        for name in planned:
            if name in places:
                self._add_row(name, content["rows"][places[name]], places[name], int(part.offsets[places[name]]), split)
        self._record_gap(unit, [name for name in planned if name not in places and name not in rejected])
        self._add_part(folder, content)
        if split == "train":
            self._add_statistics(part, content["sumsq_tokens"])

    def _check_part(self, folder: Place, content: Mapping[str, Any], unit: int, split: str, planned: Sequence[str]) -> None:
        check_same_spec(content["spec"], self.spec.to_dict(), folder)
        if (content["unit"], content["split"]) != (unit, split):
            found = f"unit {content['unit']} of split {content['split']}"
            raise UserError(f"{folder} holds {found}, expected unit {unit} of split {split}; remove it and dump the unit again")
        recorded = [entry["id"] for entry in (*content["rows"], *content["rejects"])]
        if twice := sorted(name for name, times in Counter(recorded).items() if times > 1):
            raise UserError(f"{folder} has rows {twice[:_NAMED_ROWS]} more than once; remove it and dump its unit again")
        if foreign := sorted(set(recorded) - set(planned)):
            raise UserError(
                f"{folder} has rows {foreign[:_NAMED_ROWS]}, which the plan's unit {unit} has not; remove it and dump the unit again"
            )

    def _record_gap(self, unit: int, names: Sequence[str]) -> None:
        if names:
            self.missing += names
            self.incomplete.append(unit)

    def _add_row(self, name: str, row: Mapping[str, Any], place: int, token_offset: int, split: str) -> None:
        source = self.sources.setdefault(row["source"], len(self.sources))
        self.ids.append(name)
        self.rows.append((len(self.parts), place, token_offset, row["tokens"], row["supervised"], SPLITS.index(split), source))

    def _add_part(self, folder: Place, content: Mapping[str, Any]) -> None:
        entry = {"name": folder.name, "unit": content["unit"], "split": content["split"], **content["counts"]}
        self.parts.append({**entry, "part_json": record_of((folder / PART_JSON).read())})

    def _add_statistics(self, part: Part, tokens: Mapping[str, int]) -> None:
        self._token_counts += part.whole("token_counts")
        for name in self._sumsq:
            self._sumsq[name] += part.whole(f"sumsq_{name}")
            self._sumsq_tokens[name] += tokens[name]

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays of the row table, one entry a row."""
        encoded = [name.encode() for name in self.ids]
        table = np.array(self.rows, np.int64).reshape(-1, 7)  # [N, 7]
        names = {"part": "i4", "row": "i4", "token_offset": "i8", "length": "i4", "supervised": "i4", "split": "u1", "source": "i4"}
        return {
            "id_bytes": np.frombuffer(b"".join(encoded), np.uint8),
            "id_offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),  # [N+1]
            **{name: table[:, column].astype(dtype) for column, (name, dtype) in enumerate(names.items())},
        }

    def statistics(self) -> dict[str, np.ndarray]:
        """Sums over the train split."""
        sums = {f"sumsq_{name}": squares for name, squares in self._sumsq.items()}
        return {"token_counts": self._token_counts, "sumsq_tokens": np.array(list(self._sumsq_tokens.values()), np.int64), **sums}

    def manifest(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `dump.json`."""
        total = {name: sum(part[name] for part in self.parts) for name in ("rows", "rejected", "tokens", "supervised", "stored_bytes")}
        counts = {
            "done": total.pop("rows"),
            **total,
            "raw_bytes": (len(self.spec.layers) + 1) * self.spec.hidden_size * self.spec.storage_dtype.itemsize * total["tokens"],
        }
        content = {
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_dict(),
            "counts": counts,
            "sources": list(self.sources),
            "rows_digest": digest(self.ids),
            "missing": {"units": self.incomplete, "rows": self.missing},
            "files": dict(files),
            "parts": self.parts,
        }
        return with_digest(content)
