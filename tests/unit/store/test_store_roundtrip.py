"""Write, seal, read: equality with what went in, and with plain zarr."""

import concurrent.futures
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
import zarr

from eagle3_offline.records import UserError
from eagle3_offline.store.files import record_of
from eagle3_offline.store.format import Sizes
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.reference import read_sample_with_zarr

ORDER = ["a", "b", "c", "ü", "f", "e"]  # planned order, not the order of writing


def assert_same(one, other):
    assert (one.id, one.turns) == (other.id, other.turns)
    for left, right in [(getattr(one, name), getattr(other, name)) for name in ("input_ids", "aux", "last", "last_positions")]:
        assert left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("codec", ["lossless", "lossless-fast", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_goes_in_comes_out_and_plain_zarr_agrees(build, make_spec, rows, tmp_path, dtype, codec):
    spec = make_spec(dtype=dtype, codec=codec, last_codec=codec)
    dump = Dump.open(build(tmp_path / "dump", spec))
    assert dump.spec == spec and [dump.ids(i) for i in range(len(dump))] == ORDER
    for i, name in enumerate(ORDER):
        captured, sample = rows(dtype)[name], dump.sample(i)
        assert (sample.input_ids == captured.row.input_ids).all() and sample.turns == captured.row.turns == dump.turns(i)
        assert sample.aux.tobytes() == captured.aux.tobytes() and sample.last.tobytes() == captured.last.tobytes()
        assert_same(sample, read_sample_with_zarr(dump.where.path, i))


def test_default_sizes(build, tmp_path):
    dump = Dump.open(build(tmp_path / "dump", sizes=Sizes()))
    for i in range(len(dump)):
        assert_same(dump.sample(i), read_sample_with_zarr(dump.where.path, i))


def test_last_states_only_where_a_teacher_is_needed(dump, rows):
    # row b: mask 0 0 1 1 1 1 -> last states of 1 2 3 4 5; row ü: mask 1 0 0 0 0 0 0 -> of 0 1
    opened = Dump.open(dump)
    b, u, a = opened.sample(1), opened.sample(3), opened.sample(0)
    assert b.last_positions.tolist() == [1, 2, 3, 4, 5] and (b.last == rows()["b"].last).all()
    assert u.last_positions.tolist() == [0, 1] and (u.last == rows()["ü"].last).all()
    assert a.last.shape == (0, 16)


def test_columns(dump):
    opened = Dump.open(dump)
    assert opened.lengths.tolist() == [1, 6, 64, 7, 12, 30]
    assert opened.supervised.tolist() == [0, 4, 44, 1, 4, 1]
    assert opened.splits.tolist() == [0, 0, 0, 0, 1, 1] and opened.parts.tolist() == [0, 0, 0, 1, 2, 2]
    assert opened.rows("train").tolist() == [0, 1, 2, 3] and opened.rows("eval").tolist() == [4, 5]
    assert [opened.manifest["sources"][code] for code in opened.sources] == ["chat", "chat", "code", "chat", "math", "chat"]
    with pytest.raises(UserError, match="'test'"):
        opened.rows("test")


def test_a_layer_subset_reads_no_other_layer(dump):
    whole = Dump.open(dump).sample(2)
    for path in (dump / "parts" / "unit-00000" / "h15").glob("c.*"):  # same size, so that opening the part succeeds
        path.write_bytes(bytes(path.stat().st_size))
    subset = Dump.open(dump).sample(2, layers=[2])
    assert (subset.aux == whole.aux[:, :16]).all()
    with pytest.raises(UserError, match=r"row 2 \(c\).*h15.*checksum"):
        Dump.open(dump).sample(2)
    with pytest.raises(UserError, match=r"layers \[7\]"):
        Dump.open(dump).sample(2, layers=[7])


def test_zero_states_are_written(make_row, make_spec, tmp_path, put_target):
    from eagle3_offline.store.seal import seal
    from eagle3_offline.store.writer import PartWriter

    row = make_row("z", 30)
    row.aux[:], row.last[:] = 0, 0
    with PartWriter(tmp_path, 0, "train", make_spec(), sizes=Sizes(chunk_bytes=64, shard_bytes=128)) as writer:
        writer.add(row)
        files = writer.seal()["files"]
    assert sum(name.startswith("h02/c.") for name in files) == 8  # 2 tokens a chunk, 4 a shard, 30 tokens
    put_target(tmp_path)
    seal(tmp_path, make_spec(), [(0, "train", ("z",))])
    assert not Dump.open(tmp_path).sample(0).aux.any()


def test_same_rows_give_same_files(build, tmp_path):
    one, two = build(tmp_path / "one"), build(tmp_path / "two")
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert [record_of((one / name).read_bytes()) for name in names] == [record_of((two / name).read_bytes()) for name in names]


def test_every_array_opens_with_plain_zarr(dump):
    for folder in (dump / "parts").iterdir():
        group = zarr.open(folder, mode="r")
        arrays = {path.parent.name for path in folder.glob("*/zarr.json")}
        assert {"input_ids", "loss_mask", "offsets", "turns", "turn_offsets", "h02", "h15", "last", "last_offsets", "token_counts"} < arrays
        assert all(group[name][:].shape == group[name].shape for name in arrays)
        assert group["h02"].attrs["logical_dtype"] == "bfloat16" and "logical_dtype" not in group["input_ids"].attrs


def test_threads_share_a_dump(dump):
    opened = Dump.open(dump)
    expected = [opened.sample(i) for i in range(len(opened))]
    fresh = Dump.open(dump)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for number, sample in enumerate(pool.map(lambda n: fresh.sample(n % len(fresh)), range(200))):
            assert_same(sample, expected[number % len(fresh)])


@pytest.mark.parametrize("reuse", [False, True])
def test_samples_read_ahead_are_the_same_in_the_order_asked_for(dump, reuse):
    opened = Dump.open(dump)
    order = [5, 0, 2, 2, 1, 3, 4, 0, 5, 1]
    for threads in (1, 3):
        for i, sample in zip(order, opened.samples(order, threads=threads, reuse=reuse), strict=True):
            assert_same(sample, opened.sample(i))
    layers = opened.spec.layers[1:]
    for i, sample in zip(order, opened.samples(order, layers, reuse=reuse), strict=True):
        assert_same(sample, opened.sample(i, layers))
    assert list(opened.samples([])) == []


def test_samples_raise_at_the_row_that_cannot_be_read_and_leave_no_thread(dump):
    opened = Dump.open(dump)
    before = threading.active_count()
    samples = opened.samples([0, 1, 99, 2], threads=2)
    assert [next(samples).id, next(samples).id] == ["a", "b"]
    with pytest.raises(UserError, match="row 99 is not in"):
        next(samples)
    unfinished = opened.samples([0] * 20)
    next(unfinished)
    unfinished.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dump_travels_to_processes(dump, method):
    opened = Dump.open(dump)
    expected = opened.sample(2)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert_same(pool.apply_async(Dump.sample, (opened, 2)).get(timeout=120), expected)
    assert_same(pickle.loads(pickle.dumps(opened)).sample(2), expected)


def test_few_files_stay_open(dump, monkeypatch):
    import eagle3_offline.store.reader as reader

    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    opened = Dump.open(dump)
    for i in [0, 2, 4, 2, 5, 1]:
        assert_same(opened.sample(i), read_sample_with_zarr(dump, i))
    assert opened._open_shard.cache_info().currsize == 2


def test_statistics_are_those_of_the_train_split(dump, rows):
    captured = rows()
    counts, squares, tokens = np.zeros(50, np.int64), np.zeros(16), 0
    for name in ["a", "b", "c", "ü"]:
        row = captured[name].row
        counts += np.bincount(row.input_ids[row.loss_mask > 0], minlength=50)
        values = (captured[name].aux[:, :16].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        squares, tokens = squares + (values**2).sum(0), tokens + len(values)
    statistics = Dump.open(dump).statistics
    assert (statistics["token_counts"] == counts).all() and counts.sum() == 49
    assert statistics["rms"].dtype == np.float32 and statistics["rms"].shape == (32,)
    np.testing.assert_allclose(statistics["rms"][:16], np.sqrt(squares / tokens), rtol=1e-6)


def test_target(dump, put_target):
    import torch
    from safetensors.torch import load_file

    opened = Dump.open(dump)
    tensors = opened.target_tensors()
    theirs = load_file(opened.target.path / "target.safetensors")
    assert set(tensors) == set(theirs) == {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    for name, array in tensors.items():
        assert array.dtype == np.uint16 and opened.target_dtypes()[name] == "bfloat16" and theirs[name].dtype == torch.bfloat16
        assert (theirs[name].view(torch.int16).numpy().view(np.uint16) == array).all()
    put_target(dump)  # the same again
    with pytest.raises(UserError, match="target.safetensors differ"):
        put_target(dump, value=3)
    assert not list(dump.glob(".target*")) and (opened.target / "config.json").read() == b'{"a": 1}\n'


def test_the_bytes_that_the_format_page_draws(make_spec, tmp_path):
    from eagle3_offline.records import CapturedRow, TokenRow
    from eagle3_offline.store.writer import PartWriter

    states = np.arange(16, dtype=np.uint16).reshape(8, 2)  # tokens a to h, H = 2
    row = TokenRow("row", "chat", "train", np.arange(8, dtype=np.int32), ((3, 5),), ("stop",))
    spec = make_spec(layers=(2,), hidden_size=2, codec="none", last_codec="none")
    with PartWriter(tmp_path, 42, "train", spec, sizes=Sizes(chunk_bytes=12, shard_bytes=24)) as writer:
        writer.add(CapturedRow(row, states, states[2:6]))
        writer.seal()
    folder = tmp_path / "parts" / "unit-00042"
    first, second = (list((folder / "h02" / name).read_bytes()) for name in ("c.0.0", "c.1.0"))
    zero, sixteen = [0] * 8, [16] + [0] * 7
    assert first[:16] == [0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 52, 55, 248, 96]
    assert first[16:32] == [6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 254, 158, 226, 218]
    assert first[32:] == zero + sixteen + sixteen + sixteen + [218, 19, 106, 157]
    assert second[:12] == [12, 0, 13, 0, 14, 0, 15, 0, 0, 0, 0, 0]
    assert second[16:48] == zero + sixteen + [255] * 16 and len(second) == 52
    group = zarr.open(folder, mode="r")
    assert (group["last"][:] == states[2:6]).all() and group["last_offsets"][:].tolist() == [0, 4]
    assert group["loss_mask"][:].tolist() == [0, 0, 0, 1, 1, 0, 0, 0] and group["turns"][:].tolist() == [[3, 5]]
