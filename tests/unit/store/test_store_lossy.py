"""Lossy codecs: bounds on what is lost, what is kept exactly, and the same bytes from plain zarr."""

import ml_dtypes
import numpy as np
import pytest
import zarr

from eagle3_offline.records import CapturedRow, TokenRow
from eagle3_offline.store.format import Sizes
from eagle3_offline.store.numeric import dequantise, quantise, to_float32
from eagle3_offline.store.part import Part
from eagle3_offline.store.places import LocalPlace
from eagle3_offline.store.writer import PartWriter

H = 16
CHUNK = 100  # tokens of a chunk below
CODECS = ["int8", "fp8", "bitround"]
STEP = {"int8": None, "fp8": 2.0**-4, "bitround": 2.0**-5}  # largest relative error of a value in the codec's normal range


def to_storage(values, dtype):
    if dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return values.astype(dtype)


def sizes_of(codec, dtype):
    """Chunks of CHUNK tokens, whatever the codec's item size."""
    item = {"int8": 1, "fp8": 1}.get(codec, 2 if dtype != "float32" else 4)
    return Sizes(chunk_bytes=CHUNK * H * item, shard_bytes=3 * CHUNK * H * item)


@pytest.fixture
def write(make_spec, tmp_path):
    """Write rows of states [T, 2H] under a codec and return the part, opened."""

    def make(codec, dtype, rows, threads=0):
        spec = make_spec(codec=codec, last_codec="lossless", dtype=dtype)
        with PartWriter(tmp_path / f"{codec}{threads}", 0, "train", spec, threads=threads, sizes=sizes_of(codec, dtype)) as writer:
            for number, states in enumerate(rows):
                ids = np.zeros(len(states), np.int32)
                writer.add(CapturedRow(TokenRow(f"r{number}", "s", "train", ids, (), ()), states, states[:0, :H]))
            content = writer.seal()
        return Part(LocalPlace(tmp_path / f"{codec}{threads}" / "parts" / "unit-00000"), spec), content

    return make


def random_rows(dtype, lengths=(70, 130, 64, 1, 41), seed=0):
    """Channels of very different sizes, one token 20 times as large as the rest in the third row."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 1, 2 * H)
    rows = [rng.standard_normal((length, 2 * H)) * scale for length in lengths]
    rows[2][5] *= 20
    return [to_storage(row.astype(np.float32), dtype) for row in rows]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codec", CODECS)
def test_error_is_bounded_and_the_outlier_token_is_exact(write, codec, dtype):
    rows = random_rows(dtype)
    part, _ = write(codec, dtype, rows)
    stored = np.concatenate([part.states[name].read(0, part.states[name].length) for name in ("h02", "h15")], axis=1)
    whole = np.concatenate(rows)
    assert stored.dtype == whole.dtype
    token = len(rows[0]) + len(rows[1]) + 5
    assert stored[token].tobytes() == whole[token].tobytes()
    got, wanted = to_float32(stored, dtype), to_float32(whole, dtype)
    keep = np.arange(len(whole)) != token
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-10
    for start in range(0, len(whole), CHUNK):
        inside = keep & (np.arange(len(whole)) // CHUNK == start // CHUNK)
        error, size = np.abs(got[inside] - wanted[inside]), np.abs(wanted[inside])
        largest = size.max(1, keepdims=True) if codec == "fp8" else size.max(0)
        if codec == "int8":  # half a step of the channel's own, in this chunk, and the rounding to the dtype
            assert (error <= largest / 254 * 1.001 + size * rounding).all()
        else:
            floor = largest * 2.0**-9 if codec == "fp8" else 2.0**-18 * (dtype == "float16")  # below the normal range
            assert (error <= size * (STEP[codec] + rounding) + floor).all()
        assert ((error**2).sum(0) <= (0.05 + rounding) ** 2 * (size**2).sum(0)).all()


@pytest.mark.parametrize("codec", CODECS)
def test_a_channel_that_the_codec_would_miss_is_kept_exactly(write, codec):
    """One value 200 times as large as its channel (int8), channels 1e-9 of their token (fp8): the column is stored as it is."""
    rng = np.random.default_rng(1)
    states = rng.standard_normal((250, 2 * H)).astype(np.float32)
    states[:, 3] *= 0.1
    states[130, 3] = 20
    states[:, 7] *= 1e-9
    states = to_storage(states, "bfloat16")
    part, _ = write(codec, "bfloat16", [states[:25], states[25:200], states[200:]])
    got = part.states["h02"].read(0, 250)
    at = part.states["h02"]._column_at.tolist()
    assert at == {"int8": [[1, 3]], "fp8": [[0, 7], [1, 7], [2, 7]], "bitround": []}[codec]
    for chunk, channel in at:
        inside = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        assert got[inside, channel].tobytes() == states[inside, channel].tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_ranges_equal_the_whole_and_threads_change_nothing(write, codec):
    rows = random_rows("bfloat16")
    rows[0][3, 2] = to_storage(np.float32([20 * np.abs(to_float32(rows[0], "bfloat16")[:, 2]).max()]), "bfloat16")[0]  # a kept column
    part, content = write(codec, "bfloat16", rows)
    _, threaded = write(codec, "bfloat16", rows, threads=3)
    assert content["files"] == threaded["files"]
    states = part.states["h02"]
    whole = states.read(0, states.length)
    rng = np.random.default_rng(2)
    for _ in range(60):
        start, stop = sorted(rng.integers(0, states.length + 1, 2).tolist())
        assert states.read(start, stop).tobytes() == whole[start:stop].tobytes()
        wide = np.zeros((stop - start, 3 * H), np.uint16)
        states.read_into(start, stop, wide[:, H : 2 * H])
        assert wide[:, H : 2 * H].tobytes() == whole[start:stop].tobytes() and not wide[:, :H].any()


@pytest.mark.parametrize("codec", CODECS)
def test_plain_zarr_reads_them_as_the_format_page_says(write, codec):
    rows = random_rows("bfloat16")
    part, _ = write(codec, "bfloat16", rows)
    group = zarr.open_group(part.folder.path, mode="r")
    main = group["h02"][:]
    if codec == "int8":
        values = main * np.repeat(group["h02_scale"][:], CHUNK, axis=0)[: len(main)]
    elif codec == "fp8":
        values = main.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * group["h02_scale"][:][:, None]
    else:
        values = to_float32(main, "bfloat16")
    states = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    columns = group["h02_column"][:].reshape(-1, CHUNK)
    for (chunk, channel), column in zip(group["h02_column_at"][:].tolist(), columns, strict=True):
        inside = states[chunk * CHUNK : (chunk + 1) * CHUNK, channel]
        inside[:] = column[: len(inside)]
    states[group["h02_token_at"][:]] = group["h02_token"][:]
    assert states.tobytes() == part.states["h02"].read(0, len(main)).tobytes()


def test_quantised_values_by_hand():
    # channel 0: 127, -64, 1 -> scale 1; channel 1: 254, 1, 0 -> scale 2, and 1 / 2 rounds to the even 0
    chunk = np.array([[127, 254], [-64, 1], [1, 0]], np.float32)
    done = quantise("int8", chunk, "float32", np.zeros(3, bool))
    assert done.main.tolist() == [[127, 127], [-64, 0], [1, 0]] and done.scale.tolist() == [[1, 2]] and done.columns.tolist() == []
    # token 0 is kept elsewhere and counts as zero: the scale of channel 1 is then 1 / 127
    done = quantise("int8", chunk, "float32", np.array([True, False, False]))
    assert done.main.tolist() == [[0, 0], [-127, 127], [2, 0]]
    np.testing.assert_allclose(done.scale, [[64 / 127, 1 / 127]], rtol=1e-6)
    # fp8: the largest of each token becomes 448; a token of zeros stays
    done = quantise("fp8", np.array([[1, -0.5], [0, 0]], np.float32), "float32", np.zeros(2, bool))
    assert dequantise("fp8", done.main, done.scale, "float32").tolist() == [[1, -0.5], [0, 0]]
    # bitround keeps 4 of bfloat16's 7 bits: 1 + 3/128 -> 1, 1 + 4/128 (half a step) -> the even 1, 1 + 5/128 -> 1 + 1/16
    values = to_storage(np.array([[1 + 3 / 128, 1 + 4 / 128, 1 + 5 / 128, 1 + 12 / 128]], np.float32), "bfloat16")
    done = quantise("bitround", values, "bfloat16", np.zeros(1, bool))
    assert to_float32(done.main, "bfloat16").tolist() == [[1, 1, 1 + 1 / 16, 1 + 2 / 16]]


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_and_an_empty_part(write, codec):
    part, _ = write(codec, "bfloat16", [np.zeros((25, 2 * H), np.uint16)])
    assert not part.states["h15"].read(0, 25).any()


@pytest.mark.parametrize("codec", CODECS)
def test_a_part_without_rows(make_spec, tmp_path, codec):
    spec = make_spec(codec=codec, last_codec=codec)
    with PartWriter(tmp_path, 0, "train", spec) as writer:
        writer.seal()
    assert Part(LocalPlace(tmp_path / "parts" / "unit-00000"), spec).states["last"].read(0, 0).shape == (0, H)


def test_values_whose_squares_overflow_are_kept_exactly():
    huge = to_storage(np.array([[1e20, 1e25], [1e20, 1e25]], np.float32), "bfloat16")
    assert quantise("fp8", huge, "bfloat16", np.zeros(2, bool)).columns.tolist() == [0]
    largest = np.array([[0x7F7F, 0x3F80]] * 2, np.uint16)  # 3.39e38 rounds to infinity
    assert quantise("bitround", largest, "bfloat16", np.zeros(2, bool)).columns.tolist() == [0]
