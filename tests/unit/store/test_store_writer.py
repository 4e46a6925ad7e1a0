"""The part writer: refusals before anything is recorded, bounded memory, one rename."""

import dataclasses
import json

import numpy as np
import pytest

from eagle3_offline.records import CapturedRow, Reject, TopLogits, UserError
from eagle3_offline.store.format import Sizes
from eagle3_offline.store.numeric import channel_squares, outlier_tokens
from eagle3_offline.store.part import Part
from eagle3_offline.store.places import LocalPlace
from eagle3_offline.store.writer import BadRow, PartExists, PartWriter

INFINITE = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
NOT_A_NUMBER = {"bfloat16": 0xFFC1, "float16": 0xFE01, "float32": 0xFFC00001}
LARGEST = {"bfloat16": 0x5F00, "float16": 0x7BFF, "float32": 0x5F000000}  # largest exponents whose squares stay finite


def change_row(captured, **changes):
    return CapturedRow(dataclasses.replace(captured.row, **changes), captured.aux, captured.last)


def test_bad_rows_leave_no_trace(spec, make_row, tmp_path):
    good = make_row("good")
    ids = good.row.input_ids
    bad = [
        change_row(good, id=""),
        change_row(good, split="eval"),
        change_row(good, input_ids=ids.astype(np.int64)),
        change_row(good, input_ids=np.where(ids == ids[0], np.int32(50), ids)),
        change_row(good, input_ids=np.where(ids == ids[0], np.int32(-1), ids)),
        change_row(good, finish_reasons=()),
        make_row("long", 201),
        make_row("empty", 0, ()),
        CapturedRow(good.row, good.aux[:, :16], good.last),
        CapturedRow(good.row, good.aux[:-1], good.last),
        CapturedRow(good.row, good.aux, None),
        CapturedRow(
            good.row, good.aux, good.last, TopLogits(np.zeros((4, 2), np.int32), np.zeros((4, 2), np.float16), np.zeros(4, np.float32))
        ),
        CapturedRow(good.row, good.aux, good.last[:-1]),
        CapturedRow(good.row, good.aux, good.last[:, :-1]),
        CapturedRow(good.row, good.aux, good.last.astype(np.float32)),
    ]
    with PartWriter(tmp_path / "mixed", 0, "train", spec) as writer:
        for captured in bad:
            with pytest.raises(BadRow):
                writer.add(captured)
        writer.add(good)
        with pytest.raises(BadRow, match="added or rejected before"):
            writer.add(good)
        with pytest.raises(BadRow, match="added or rejected before"):
            writer.reject(Reject("late", id="good"))
        with pytest.raises(UserError, match="without a row id"):
            writer.reject(Reject("nobody"))
        mixed = writer.seal()
    with PartWriter(tmp_path / "clean", 0, "train", spec) as writer:
        writer.add(good)
        assert writer.seal() == mixed


@pytest.mark.parametrize("where", ["layer", "last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_that_are_not_finite_are_refused(make_spec, make_row, tmp_path, dtype, where):
    with PartWriter(tmp_path, 0, "train", make_spec(dtype=dtype)) as writer:
        for number, bits in enumerate([INFINITE[dtype], NOT_A_NUMBER[dtype], LARGEST[dtype]]):
            captured = make_row(f"row{number}", dtype=dtype)
            states = captured.aux if where == "layer" else captured.last
            states.view(f"u{states.dtype.itemsize}")[2, 3] = bits
            if bits == LARGEST[dtype]:
                writer.add(captured)
            else:
                with pytest.raises(BadRow, match="infinite or not a number"):
                    writer.add(captured)
        assert writer.seal()["counts"]["rows"] == 1


def test_part_json_tells_all(spec, make_row, tmp_path):
    with PartWriter(tmp_path, 42, "eval", spec) as writer:
        writer.add(make_row("one", 10, ((3, 5), (7, 10)), "eval"))
        writer.reject(Reject("too long", id="two"))
        content = writer.seal()
    assert json.loads((tmp_path / "parts" / "unit-00042" / "part.json").read_text()) == content
    row = {"id": "one", "source": "chat", "tokens": 10, "supervised": 5, "finish_reasons": ["stop", "stop"]}
    assert content["rows"] == [row] and content["rejects"] == [{"id": "two", "reason": "too long"}]
    stored = sum(record["bytes"] for record in content["files"].values())
    assert content["counts"] == {"rows": 1, "rejected": 1, "tokens": 10, "supervised": 5, "last": 8, "stored_bytes": stored}


def test_a_part_may_hold_rejects_only(spec, tmp_path):
    with PartWriter(tmp_path, 0, "train", spec) as writer:
        writer.reject(Reject("too long", id="x"))
        writer.seal()
    part = Part(LocalPlace(tmp_path / "parts" / "unit-00000"), spec)
    assert part.offsets.tolist() == [0] and part.states["h02"].read(0, 0).shape == (0, 16) and part.whole("turns").shape == (0, 2)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_an_abandoned_writer_leaves_nothing(spec, make_row, tmp_path, error):
    try:
        with PartWriter(tmp_path, 0, "train", spec, sizes=Sizes(chunk_bytes=64, shard_bytes=64)) as writer:
            writer.add(make_row("a", 100))
            assert len(list((tmp_path / "parts").rglob("c.*"))) > 100  # full shards are on disk already
            if error:
                raise error
    except RuntimeError:
        pass
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_unit_is_sealed_once(spec, make_row, tmp_path):
    first, second = (PartWriter(tmp_path, 0, "train", spec) for _ in range(2))
    second._temporary = second._temporary.with_suffix(".other")  # as from another process
    with pytest.raises(PartExists, match="exists already"):
        with first, second:
            first.add(make_row("a"))
            second.add(make_row("b"))
            content = first.seal()
            second.seal()
    with pytest.raises(PartExists):
        PartWriter(tmp_path, 0, "train", spec).__enter__()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["unit-00000"]
    assert content["rows"][0]["id"] == "a" and content == json.loads((tmp_path / "parts" / "unit-00000" / "part.json").read_text())


def test_everything_is_on_disk_before_the_rename(spec, make_row, tmp_path, fsynced):
    with PartWriter(tmp_path, 0, "train", spec, sizes=Sizes(chunk_bytes=64, shard_bytes=128)) as writer:
        writer.add(make_row("a"))
        writer.seal()
    folder, temporary = tmp_path / "parts" / "unit-00000", str(writer._temporary)
    expected = {temporary, *(f"{temporary}/{path.relative_to(folder)}" for path in folder.rglob("*"))}
    assert fsynced == expected | {str(folder.parent)}


def test_no_seal_after_a_failed_write(spec, make_row, tmp_path, monkeypatch):
    with PartWriter(tmp_path, 0, "train", spec) as writer:
        writer.add(make_row("a"))
        monkeypatch.setattr(writer._states["last"], "append", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            writer.add(make_row("b"))
        with pytest.raises(UserError, match="incomplete"):
            writer.seal()


def test_outlier_tokens_are_left_out_of_the_squares(spec, make_row, tmp_path):
    states = np.ones((10, 16), np.float32)
    states[4] *= 9  # norm 9 medians: out
    states[7] *= 8  # norm 8 medians: in
    outliers = outlier_tokens(states, "float32")
    assert np.flatnonzero(outliers).tolist() == [4]
    assert channel_squares(states, "float32", outliers).tolist() == [8 + 64] * 16

    captured = make_row("a", 10)
    captured.aux[4, 16:] = 0x4500  # 2048: an attention sink
    with PartWriter(tmp_path, 0, "train", spec) as writer:
        writer.add(captured)
        content = writer.seal()
    assert content["sumsq_tokens"] == {"h02": 10, "h15": 9}
    assert Part(LocalPlace(tmp_path / "parts" / "unit-00000"), spec).whole("sumsq_h15").max() < 100
