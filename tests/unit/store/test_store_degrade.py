"""`store degrade`: any mode from a lossless dump, equal to what a dump of that mode would have written."""

import numpy as np
import pytest
import torch

from eagle3_offline.capture import compact as compact_module
from eagle3_offline.capture.compact import Reduction, top_logits
from eagle3_offline.capture.degrade import degrade, fit_basis_of_dump
from eagle3_offline.config import DumpConfig
from eagle3_offline.records import UserError
from eagle3_offline.runs import StopSignal
from eagle3_offline.store.format import Sizes
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.verify import verify


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
    with pytest.raises(UserError, match="degrade a lossless dump"):
        degrade(dump.where, tmp_path / "again", DumpConfig(codec="int8"), stop)
    again = fit_basis_of_dump(source, 8, stop)
    for name in ("scale", "eigenvalues"):
        np.testing.assert_allclose(again[name], basis[name], rtol=1e-4)
    assert Reduction(dump.spec, basis, torch.zeros(50, 16)).projection.shape == (32, 8)


def test_it_goes_on_where_it_was_stopped(dump, tmp_path, stop, monkeypatch):
    config = DumpConfig(codec="int8")
    degrade(dump, tmp_path / "whole", config, stop)
    import eagle3_offline.capture.degrade as module

    finish, calls = module._degrade_part, []

    def stops_after_one(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(finish(*args))

    monkeypatch.setattr(module, "_degrade_part", stops_after_one)
    with pytest.raises(KeyboardInterrupt):
        degrade(dump, tmp_path / "twice", config, stop)
    monkeypatch.setattr(module, "_degrade_part", finish)
    degrade(dump, tmp_path / "twice", config, stop)
    assert Dump.open(tmp_path / "twice").manifest == Dump.open(tmp_path / "whole").manifest
