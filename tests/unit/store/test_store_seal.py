"""Sealing: gaps by row id, refusals, idempotence, and what opening costs."""

import dataclasses
import shutil

import pytest

from eagle3_offline.records import UserError
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.seal import missing_units, seal, sealed


def test_counts_add_up(dump):
    manifest = Dump.open(dump).manifest
    counts = manifest["counts"]
    assert (counts["done"], counts["rejected"], counts["tokens"], counts["supervised"]) == (6, 1, 120, 54)
    assert counts["raw_bytes"] == 3 * 16 * 2 * 120
    files = [path for path in (dump / "parts").rglob("*") if path.is_file() and path.name != "part.json"]
    assert counts["stored_bytes"] == sum(path.stat().st_size for path in files)
    assert manifest["missing"] == {"units": [], "rows": []}


def test_sealing_again_changes_nothing(dump, spec, units):
    before = {name: (dump / name).read_bytes() for name in ("dump.json", "rows.safetensors", "statistics.safetensors")}
    seal(dump, spec, units[::-1])
    assert {name: (dump / name).read_bytes() for name in before} == before


def test_gaps_are_named(write_parts, put_target, tmp_path, spec, units):
    put_target(tmp_path)
    write_parts(tmp_path, spec)
    shutil.rmtree(tmp_path / "parts" / "unit-00001")
    planned = [(0, "train", ("a", "b", "x", "lost", "c")), *units[1:]]
    with pytest.raises(UserError, match=r"2 planned rows .*\(lost, ü\), in units 0,1"):
        seal(tmp_path, spec, planned)
    assert not (tmp_path / "dump.json").exists()
    assert missing_units(tmp_path, planned) == [1] and not sealed(tmp_path, 1) and sealed(tmp_path, 0)

    manifest = seal(tmp_path, spec, planned, allow_partial=True)
    assert manifest["missing"] == {"units": [0, 1], "rows": ["lost", "ü"]}
    opened = Dump.open(tmp_path)
    assert [opened.ids(i) for i in range(len(opened))] == ["a", "b", "c", "f", "e"]
    assert opened.sample(4).id == "e"


def test_refusals(write_parts, put_target, tmp_path, spec, units):
    write_parts(tmp_path, spec)
    with pytest.raises(UserError, match="index.json is missing"):
        seal(tmp_path, spec, units)
    put_target(tmp_path)
    with pytest.raises(UserError, match="max_length is 200, expected 300"):
        seal(tmp_path, dataclasses.replace(spec, max_length=300), units)
    with pytest.raises(UserError, match="row a is planned in unit 0 and in unit 1"):
        seal(tmp_path, spec, [units[0], (1, "train", ("ü", "a")), units[2]])
    with pytest.raises(UserError, match=r"rows \['b'\], which the plan's unit 0 has not"):
        seal(tmp_path, spec, [(0, "train", ("a", "x", "c")), *units[1:]])
    with pytest.raises(UserError, match="unit 2 of split eval, expected unit 2 of split train"):
        seal(tmp_path, spec, [*units[:2], (2, "train", ("f", "e"))])
    (tmp_path / "target" / "config.json").write_bytes(b'{"a": 2}\n')
    with pytest.raises(UserError, match=r"config.json has digest"):
        seal(tmp_path, spec, units)


def test_a_dump_without_train_rows_has_no_rms(write_parts, put_target, tmp_path, spec, units):
    put_target(tmp_path)
    write_parts(tmp_path, spec)
    seal(tmp_path, spec, units[2:])
    with pytest.raises(UserError, match="no train tokens"):
        _ = Dump.open(tmp_path).statistics


def test_opening_does_not_look_at_parts(dump):
    shutil.rmtree(dump / "parts" / "unit-00000")
    opened = Dump.open(dump)
    assert len(opened) == 6 and opened.ids(2) == "c" and opened.lengths.sum() == 120
    assert opened.sample(4).id == "f"  # other parts are not concerned
    with pytest.raises(UserError, match=r"row 2 \(c\).*unit-00000/part.json is missing"):
        opened.sample(2)


def test_nothing_but_a_sealed_dump_opens(dump, tmp_path):
    with pytest.raises(UserError, match="expected a sealed dump"):
        Dump.open(tmp_path)
    manifest = dump / "dump.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 9', 1))
    with pytest.raises(UserError, match="format version 9"):
        Dump.open(dump)
