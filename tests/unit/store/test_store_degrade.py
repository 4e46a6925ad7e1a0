"""`store degrade`: any mode from a lossless dump, equal to what a dump of that mode would have written."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from eagle3_offline.capture import compact as compact_module
from eagle3_offline.capture.compact import make_reducer
from eagle3_offline.capture.degrade import degrade, fit_basis_of_dump
from eagle3_offline.config import DumpConfig
from eagle3_offline.records import TooManyRejected, UserError
from eagle3_offline.runs import StopSignal
from eagle3_offline.store import estimate as estimate_module
from eagle3_offline.store.format import Sizes
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.verify import verify
from eagle3_offline.target.reduction import top_logits


@pytest.fixture
def stop():
    return StopSignal()


@pytest.fixture(autouse=True)
def few_tokens_suffice(monkeypatch):
    monkeypatch.setattr(compact_module, "TOKENS_PER_CHANNEL", 1)


def following(sample):
    return np.append(sample.input_ids, -1)[sample.last_positions + 1]


def same_rows(one, other):
    assert [one.ids(i) for i in range(len(one))] == [other.ids(i) for i in range(len(other))]
    assert one.turns(2) == other.turns(2) and (one.splits == other.splits).all()
    assert {key: one.manifest["counts"][key] for key in ("done", "rejected", "tokens", "supervised")} == {
        key: other.manifest["counts"][key] for key in ("done", "rejected", "tokens", "supervised")
    }


@pytest.mark.parametrize("codec", ["int8", "fp8", "bitround", "none"])
def test_it_equals_a_dump_of_that_codec(dump, build, make_spec, tmp_path, stop, codec):
    degrade(dump, tmp_path / "degraded", DumpConfig(codec=codec, last_codec="lossless"), stop)
    direct = Dump.open(build(tmp_path / "direct", make_spec(codec=codec), sizes=Sizes()))
    degraded = Dump.open(tmp_path / "degraded")
    same_rows(degraded, Dump.open(dump))
    assert degraded.spec == direct.spec and verify(tmp_path / "degraded") == []
    for i in range(len(direct)):
        assert degraded.sample(i).aux.tobytes() == direct.sample(i).aux.tobytes()
        assert degraded.sample(i).last.tobytes() == direct.sample(i).last.tobytes()
    assert degraded.manifest == direct.manifest


def test_a_compact_dump(build, make_spec, tmp_path, stop):
    source = Dump.open(build(tmp_path / "full", make_spec(dtype="float32")))
    degrade(source.where, tmp_path / "compact", DumpConfig(mode="compact", rank=0.5, top_k=4, codec="none"), stop)
    dump = Dump.open(tmp_path / "compact")
    same_rows(dump, source)
    assert verify(dump.where) == [] and (dump.spec.compact.rank, dump.spec.compact.top_k) == (8, 4)
    basis = dump.basis()
    projection = basis["components"] / basis["scale"][:, None]
    for i in range(len(dump)):
        full, reduced = source.sample(i), dump.sample(i)
        assert reduced.last is None and (reduced.last_positions == full.last_positions).all()
        np.testing.assert_allclose(reduced.aux, full.aux @ projection, atol=1e-5)
        head = (source.target_tensors()["lm_head.weight"].astype(np.uint32) << 16).view(np.float32)  # bfloat16
        wanted = top_logits(torch.from_numpy(full.last), torch.from_numpy(head), following(full), 4)
        for name in ("ids", "log_probs", "log_normaliser"):
            assert getattr(reduced.top, name).tobytes() == getattr(wanted, name).tobytes()
    window = dump.sample(2, window=(15, 40))
    assert window.aux.tobytes() == dump.sample(2).aux[15:40].tobytes()
    kept = (dump.sample(2).last_positions >= 15) & (dump.sample(2).last_positions < 40)
    assert (window.top.ids == dump.sample(2).top.ids[kept]).all()
    with pytest.raises(UserError, match="is a compact dump: it holds a projection"):
        dump.sample(0, layers=[2])
    with pytest.raises(UserError, match="is compact itself; degrade a full lossless dump"):
        degrade(dump.where, tmp_path / "again", DumpConfig(codec="int8"), stop)
    again = fit_basis_of_dump(source, 8, stop)
    for name in ("scale", "eigenvalues"):
        np.testing.assert_allclose(again[name], basis[name], rtol=1e-4)
    assert make_reducer(dump.spec, basis, torch.zeros(50, 16)).projection.shape == (32, 8)


def test_it_goes_on_where_it_was_stopped(dump, tmp_path, stop, monkeypatch):
    config = DumpConfig(codec="int8")
    degrade(dump, tmp_path / "whole", config, stop)
    import eagle3_offline.capture.degrade as module

    finish, calls = module._degrade_part, []

    def stops_after_one(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return finish(*args)

    monkeypatch.setattr(module, "_degrade_part", stops_after_one)
    with pytest.raises(KeyboardInterrupt):
        degrade(dump, tmp_path / "twice", config, stop)
    monkeypatch.setattr(module, "_degrade_part", finish)
    degrade(dump, tmp_path / "twice", config, stop)
    assert Dump.open(tmp_path / "twice").manifest == Dump.open(tmp_path / "whole").manifest


def test_a_folder_is_bound_to_its_source(dump, build, make_spec, tmp_path, stop):
    """An attempt that was interrupted after the basis is not finished with another dump, nor with other settings."""
    config = DumpConfig(mode="compact", rank=0.5, top_k=4)
    degrade(dump, tmp_path / "compact", config, stop)
    other = build(tmp_path / "other", make_spec(max_length=199))
    with pytest.raises(UserError, match="was begun with"):
        degrade(other, tmp_path / "compact", config, stop)
    with pytest.raises(UserError, match="'rank': 4"):
        degrade(dump, tmp_path / "compact", dataclasses.replace(config, rank=0.25), stop)
    with pytest.raises(UserError, match="holds another dump"):
        degrade(dump, other, DumpConfig(codec="int8"), stop)
    with pytest.raises(UserError, match="holds another dump"):
        degrade(dump, dump, DumpConfig(codec="int8"), stop)


def test_rows_that_the_mode_cannot_hold_are_named(make_row, make_spec, put_target, tmp_path, stop):
    """float16: an attention sink, which the basis leaves out, is too large once it is divided by its channels' rms."""
    from eagle3_offline.store.seal import seal
    from eagle3_offline.store.writer import PartWriter

    spec = make_spec(dtype="float16")
    put_target(tmp_path / "source")
    with PartWriter(tmp_path / "source", 0, "train", spec) as writer:
        for n in range(4):
            row = make_row(f"r{n}", 30, ((3, 9),), dtype="float16")
            row.aux[:] *= np.float16(0.001)
            row.aux[0] = 30000
            writer.add(row)
        writer.seal()
    seal(tmp_path / "source", spec, [(0, "train", tuple(f"r{n}" for n in range(4)))])
    with pytest.raises(TooManyRejected, match="4 of 4 rows could not be stored"):
        degrade(tmp_path / "source", tmp_path / "compact", DumpConfig(mode="compact", rank=0.5, top_k=4, codec="none"), stop)


def test_what_a_partial_dump_lacks_stays_known(write_parts, put_target, spec, units, tmp_path, stop):
    from eagle3_offline.store.merge import merge
    from eagle3_offline.store.seal import seal

    put_target(tmp_path / "partial")
    write_parts(tmp_path / "partial", spec)
    seal(tmp_path / "partial", spec, [(0, "train", ("a", "b", "x", "lost", "c")), *units[1:]], allow_partial=True)
    degrade(tmp_path / "partial", tmp_path / "lossy", DumpConfig(codec="int8"), stop)
    for manifest in (Dump.open(tmp_path / "lossy").manifest, merge([tmp_path / "partial"], tmp_path / "merged")):
        assert manifest["missing"]["rows"] == ["lost"]


def test_a_disk_that_is_too_small_is_refused_before_any_part(dump, tmp_path, stop, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate_module.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="is estimated at .* has 0.00 GB free.*dump.force=true"):
        degrade(dump, tmp_path / "degraded", DumpConfig(codec="int8"), stop)
    assert not (tmp_path / "degraded" / "parts").exists()
    assert degrade(dump, tmp_path / "degraded", DumpConfig(codec="int8", force=True), stop)["done"] == len(Dump.open(dump))
