"""Merge, repair, info, estimate, windows and the background writer."""

import dataclasses
import json
import os
import socket

import numpy as np
import pytest

from eagle3_offline.records import Reject, UserError
from eagle3_offline.store.background import BackgroundPart
from eagle3_offline.store.estimate import estimate
from eagle3_offline.store.format import OtherVersion, Sizes
from eagle3_offline.store.info import entropy_ratio, info
from eagle3_offline.store.merge import merge
from eagle3_offline.store.places import LocalPlace
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.repair import abandoned, repair
from eagle3_offline.store.seal import missing_units, seal
from eagle3_offline.store.verify import verify
from eagle3_offline.store.writer import PartWriter

# -- merge


@pytest.fixture
def other(make_row, make_spec, put_target, tmp_path):
    """A second dump of the same target with other rows and another system prompt."""
    spec = make_spec(conversation={"system_prompt": "Be brief."})
    put_target(tmp_path / "other")
    with PartWriter(tmp_path / "other", 0, "train", spec) as writer:
        for name in ("m", "n"):
            writer.add(make_row(name, 20, ((5, 9),), source="code"))
        writer.reject(Reject("empty", id="o"))
        writer.seal()
    seal(tmp_path / "other", spec, [(0, "train", ("n", "o", "m"))])
    return tmp_path / "other"


def test_merged_dumps_hold_the_rows_of_both(dump, other, tmp_path):
    manifest = merge([dump, other], tmp_path / "both")
    both, one, two = Dump.open(tmp_path / "both"), Dump.open(dump), Dump.open(other)
    assert [both.ids(i) for i in range(len(both))] == ["a", "b", "c", "ü", "f", "e", "n", "m"]
    for i in range(len(both)):
        source, k = (one, i) if i < len(one) else (two, i - len(one))
        assert both.sample(i).aux.tobytes() == source.sample(k).aux.tobytes() and both.turns(i) == source.turns(k)
    assert manifest["counts"]["rejected"] == 2 and [part["unit"] for part in manifest["parts"]] == [0, 1, 2, 3]
    assert both.spec.conversation == {"merged": [one.spec.conversation, two.spec.conversation]}
    assert (both.statistics["token_counts"] == one.statistics["token_counts"] + two.statistics["token_counts"]).all()
    assert verify(tmp_path / "both") == verify(dump) == []


def test_dumps_that_do_not_go_together_are_refused(dump, other, build, make_spec, tmp_path):
    with pytest.raises(UserError, match="row a is planned in unit 0 and in unit 3"):
        merge([dump, dump], tmp_path / "twice")
    with pytest.raises(UserError, match="codec is 'int8', expected 'lossless'"):
        merge([dump, build(tmp_path / "lossy", make_spec(codec="int8"))], tmp_path / "mixed")
    with pytest.raises(UserError, match="holds a dump already"):
        merge([dump], other)
    next((other / "parts" / "unit-00000" / "h02").glob("c.*")).unlink()
    with pytest.raises(UserError, match="is damaged, nothing was merged"):
        merge([dump, other], tmp_path / "damaged")


# -- repair


def test_repair_drops_what_is_bad_and_a_rerun_completes(dump, write_parts, spec, units):
    shard = next((dump / "parts" / "unit-00001" / "h15").glob("c.*"))
    before = {name: (dump / name).read_bytes() for name in ("dump.json", "rows.safetensors")}
    shard.write_bytes(shard.read_bytes()[:-1])
    dead = dump / "parts" / f".unit-00007.{socket.gethostname()}.4194305.tmp"  # above the largest pid
    alive = dump / "parts" / f".unit-00008.{socket.gethostname()}.{os.getpid()}.tmp"
    elsewhere = dump / "parts" / ".unit-00009.other-host.1.tmp"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
    planned = repair(dump, dry_run=True)
    assert list(planned["dropped"]) == ["unit-00001"] and planned["leftovers"] == [dead.name] and planned["good"] == 2
    assert shard.exists() and dead.exists()
    assert {**repair(dump), "dry_run": True} == planned
    assert not (dump / "parts" / "unit-00001").exists() and not dead.exists() and alive.exists() and elsewhere.exists()
    assert not (dump / "dump.json").exists() and missing_units(dump, units) == [1]
    os.utime(elsewhere, (0, 0))
    assert repair(dump)["leftovers"] == [elsewhere.name]
    with pytest.raises(UserError, match="exists already"):
        write_parts(dump, spec)  # unit 0 is there
    (dump / "parts" / "unit-00000").rename(dump / "kept0")
    (dump / "parts" / "unit-00002").rename(dump / "kept2")
    write_parts(dump, spec)
    seal(dump, spec, units)
    assert {name: (dump / name).read_bytes() for name in before} == before and verify(dump) == []


def test_repair_touches_nothing_that_it_cannot_judge(dump, monkeypatch):
    part = dump / "parts" / "unit-00001" / "part.json"
    whole = part.read_bytes()
    part.write_bytes(whole.replace(b'"format_version": 2', b'"format_version": 1', 1))
    with pytest.raises(OtherVersion, match="use the release that wrote it"):
        repair(dump)
    part.write_bytes(whole)
    stray = dump / "parts" / "unit-00001" / ".nfs0001"
    stray.write_bytes(b"")
    assert repair(dump)["dropped"] == {} and stray.exists()

    def stale(path):
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(LocalPlace, "open", lambda self: stale(self.path))
    with pytest.raises(OSError, match="Stale"):
        repair(dump)
    assert len(list((dump / "parts").glob("unit-*"))) == 3


@pytest.mark.parametrize("name", [".unit-00003.{host}2.4194305.tmp", ".unit-00003.x{host}.4194305.tmp", ".unit-00003.{host}.none.tmp"])
def test_another_hosts_part_is_not_taken_for_ours(tmp_path, name):
    folder = tmp_path / name.format(host=socket.gethostname())
    folder.mkdir()
    assert not abandoned(LocalPlace(folder), stale_hours=1)
    assert abandoned(LocalPlace(folder), stale_hours=-1)


# -- info and estimate


def test_info_adds_up(dump):
    report = info(dump)
    assert (report["rows"], report["rejected"], report["tokens"], report["supervised_share"]) == (6, 1, 120, 54 / 120)
    assert sum(array["bytes"] for array in report["arrays"].values()) == pytest.approx(
        report["stored_bytes"], abs=200
    )  # zarr.json of groups
    assert report["lengths"] == {"<= 64": 6}
    assert report["arrays"]["h02"]["entropy_ratio"] > 1 and "ratio" in report["arrays"]["last"]
    assert report["files"] == sum(path.is_file() for path in (dump / "parts").rglob("*"))
    json.dumps(report)


def test_entropy_ratio_by_hand():
    # low bytes: 0 and 1 equally often, 1 bit; high bytes: always 2, 0 bits -> 16 bits of storage for 1 of content
    assert entropy_ratio(np.array([[0x0200, 0x0201]] * 8, np.uint16)) == pytest.approx(16)


def test_estimate(make_spec):
    spec = make_spec(hidden_size=4096, vocab_size=128256, layers=(2, 16, 29), codec="none", last_codec="none")
    found = estimate(spec, rows=5000, tokens=3_000_000, teachers=1_800_000, tokens_per_second=10_000)
    assert found.raw_bytes == 3_000_000 * 4 * 4096 * 2
    assert found.bytes == 3_000_000 * (3 * 4096 * 2 + 4) + 1_800_000 * 4096 * 2
    assert found.hours == pytest.approx(300 / 3600)
    assert 3 * 30 < found.files < 3 * 30 + 3 * 4 * 160


def test_estimates_stay_above_what_is_stored(dump, spec):
    counts = Dump.open(dump).manifest["counts"]
    states = sum(array["bytes"] for name, array in info(dump)["arrays"].items() if name in ("h02", "h15", "last"))
    assert counts["tokens"] == 120 and states > 0  # tiny arrays are mostly metadata; the shares are measured on real dumps
    assert estimate(spec, 6, 120, 54).bytes < counts["raw_bytes"]


# -- windows and reused memory


def test_windows_are_pieces_of_the_row(dump):
    opened = Dump.open(dump)
    whole = opened.sample(2)  # 64 tokens, turns [10, 20) and [30, 64)
    part = opened.sample(2, layers=[15], window=(15, 40))
    assert part.turns == ((0, 5), (15, 25)) and (part.input_ids == whole.input_ids[15:40]).all()
    assert (part.aux == whole.aux[15:40, 16:]).all()
    kept = (whole.last_positions >= 15) & (whole.last_positions < 40)
    assert (part.last == whole.last[kept]).all() and (part.last_positions == whole.last_positions[kept] - 15).all()
    for window in ((5, 5), (-1, 3), (0, 65)):
        with pytest.raises(UserError, match="of a row with 64"):
            opened.sample(2, window=window)


def test_memory_is_used_again(dump):
    opened = Dump.open(dump)
    memory = np.empty((64, 32), np.uint16)
    for i in (2, 1, 5, 2):
        sample = opened.sample(i, aux=memory)
        assert np.shares_memory(sample.aux, memory) and (sample.aux == opened.sample(i).aux).all()
    for wrong in (memory.astype(np.float32), memory[:63], memory[:, :31]):
        with pytest.raises(UserError, match="the memory for aux"):
            opened.sample(2, aux=wrong)


# -- the background writer


def test_the_background_writer_writes_the_same_part(spec, make_row, tmp_path):
    rows = [make_row(f"r{n}", 30, ((3, 9),)) for n in range(8)]
    with PartWriter(tmp_path / "plain", 0, "train", spec) as part:
        for row in rows:
            part.add(row)
        plain = part.seal()
    with BackgroundPart(PartWriter(tmp_path / "background", 0, "train", spec, threads=2, sizes=Sizes()), queue_bytes=1) as background:
        for row in rows:
            background.add(row)
        assert background.finish() == []
        assert background.part.seal() == plain


def test_rows_that_cannot_be_stored_become_rejects(spec, make_row, tmp_path):
    bad = make_row("bad", 30)
    bad.aux[3, 3] = 0x7F80
    with BackgroundPart(PartWriter(tmp_path, 0, "train", spec)) as background:
        for row in (make_row("a"), bad, dataclasses.replace(make_row("b"), last=None)):
            background.add(row)
        rejects = background.finish()
        content = background.part.seal()
    assert [reject.id for reject in rejects] == ["bad", "b"] and all(reject.retry for reject in rejects)
    assert [row["id"] for row in content["rows"]] == ["a"] and [entry["id"] for entry in content["rejects"]] == ["bad", "b"]


def test_what_the_thread_raises_reaches_the_caller(spec, make_row, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="disk full"), BackgroundPart(PartWriter(tmp_path, 0, "train", spec), queue_bytes=1) as background:
        monkeypatch.setattr(background.part, "add", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        for n in range(5):
            background.add(make_row(f"r{n}"))
    assert list((tmp_path / "parts").iterdir()) == []


def test_leaving_early_publishes_nothing(spec, make_row, tmp_path):
    with pytest.raises(RuntimeError), BackgroundPart(PartWriter(tmp_path, 0, "train", spec, threads=2)) as background:
        background.add(make_row("a"))
        raise RuntimeError
    assert list((tmp_path / "parts").iterdir()) == []
