"""The spec's dict form, array metadata and sizes."""

import subprocess
import sys

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from eagle3_offline.records import UserError
from eagle3_offline.store.format import DumpSpec, array_metadata, last_positions, plain_layouts, state_layouts


def test_spec_survives_its_dict(spec):
    value = spec.to_dict()
    assert value["layer_convention"] == "boundary" and value["last_norm"] == "post" and value["format_version"] == 2
    assert DumpSpec.from_dict(value) == spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 1}, "version 1"),
        ({"format_version": None}, "version None"),
        ({"surprise": 1}, "unknown keys surprise"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"codec": "gzip"}, "codec is 'gzip'"),
        ({"last_codec": "gzip"}, "last_codec is 'gzip'"),
        ({"last_codec": None}, "last_codec is None"),
        ({"compact": {"rank": 4, "top_k": 2, "basis": "x"}}, "holds no last states"),
        ({"compact": {"rank": 0, "top_k": 2, "basis": "x"}, "last_codec": None}, "rank is 0"),
        ({"layers": [2, 2]}, "each once"),
        ({"layers": [15, 2]}, "ascending"),
        ({"layers": []}, "one or more"),
        ({"layers": [-1]}, "from 0"),
        ({"last_norm": "pre"}, "last_norm"),
        ({"layer_convention": "output"}, "layer_convention"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"max_length": True}, "max_length"),
        ({"target": "llama"}, "target"),
        ({"engine": {"flags": (1, 2)}}, "engine"),
        ({"conversation": {"temperature": float("nan")}}, "conversation"),
    ],
)
def test_spec_refuses(spec, change, words):
    with pytest.raises(UserError, match=words):
        DumpSpec.from_dict({**spec.to_dict(), **change})


@pytest.mark.parametrize("key", ["format_version", "layers", "engine", "last_norm", "max_length"])
def test_spec_refuses_a_missing_key(spec, key):
    value = spec.to_dict()
    del value[key]
    with pytest.raises(UserError):
        DumpSpec.from_dict(value)


def test_last_positions():
    # token      a b c d e f g h i j
    # mask       0 0 0 1 1 0 0 0 0 1
    # stored     . . c d e f . . i j
    assert last_positions(((3, 5), (9, 10)), 10).tolist() == [2, 3, 4, 5, 8, 9]
    assert last_positions(((0, 1),), 4).tolist() == [0, 1]
    assert last_positions(((1, 4),), 4).tolist() == [0, 1, 2, 3]
    assert last_positions((), 4).tolist() == []


@pytest.mark.parametrize(("hidden", "chunk_rows"), [(4096, 64), (576, 455), (64, 4096), (1_000_000, 1)])
def test_sizes_go_by_bytes(make_spec, hidden, chunk_rows):
    layout = state_layouts(make_spec(hidden_size=hidden))["h02"].main
    assert layout.chunk_rows == chunk_rows
    assert layout.chunks_per_shard == max(1, (64 << 20) // (chunk_rows * layout.row_bytes))


BLOSC = {
    "lossless": {"cname": "zstd", "shuffle": "shuffle"},
    "lossless-fast": {"cname": "lz4", "shuffle": "bitshuffle"},
    "int8": {"cname": "zstd", "shuffle": "shuffle"},
    "none": None,
}


@pytest.mark.parametrize("codec", BLOSC)
@pytest.mark.parametrize("name", ["h02", "input_ids", "loss_mask", "turns", "sumsq_h15"])
def test_metadata_is_what_zarr_itself_writes(make_spec, tmp_path, name, codec):
    spec = make_spec(codec=codec)
    layout = state_layouts(spec)[name].main if name == "h02" else plain_layouts(spec)[name]
    metadata = array_metadata(layout, 100)
    settings = BLOSC[codec if name == "h02" else "lossless"]
    blosc = [BloscCodec(clevel=1, typesize=layout.dtype.itemsize, blocksize=1 << 20, **settings)] if settings else []
    array = zarr.create_array(
        store=tmp_path / "array",
        shape=(100, *layout.row_shape),
        chunks=(layout.chunk_rows, *layout.row_shape),
        shards=(layout.chunk_rows * layout.chunks_per_shard, *layout.row_shape),
        dtype=layout.dtype,
        serializer=BytesCodec(endian="little") if layout.dtype.itemsize > 1 else BytesCodec(),
        compressors=[*blosc, Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        fill_value=0,
        attributes=metadata["attributes"],
    )
    theirs, ours = array.metadata.to_dict(), zarr.core.metadata.ArrayV3Metadata.from_dict(metadata).to_dict()
    assert np.isclose(theirs.pop("fill_value"), ours.pop("fill_value"))
    assert ours == theirs


def test_the_store_needs_neither_torch_nor_zarr():
    modules = ", ".join(f"eagle3_offline.store.{name}" for name in ("writer", "reader", "seal", "verify", "target_files"))
    code = f"import sys, {modules}; print(sorted({{'torch', 'pyarrow', 'zarr', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
