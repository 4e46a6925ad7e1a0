"""Tiny random dumps. Legend: T tokens, H hidden size, V vocabulary size."""

import dataclasses
import os

import numpy as np
import pytest

from eagle3_offline.records import CapturedRow, Reject, TokenRow
from eagle3_offline.store.format import DumpSpec, Sizes, last_positions
from eagle3_offline.store.seal import seal
from eagle3_offline.store.target_files import write_target
from eagle3_offline.store.writer import PartWriter

H, V, LAYERS = 16, 50, (2, 15)
SMALL = Sizes(chunk_bytes=7 * H * 2, shard_bytes=3 * 7 * H * 2)  # bf16: 7 tokens a chunk, 21 a shard

SPEC = DumpSpec(
    layers=LAYERS,
    hidden_size=H,
    vocab_size=V,
    dtype="bfloat16",
    codec="lossless",
    last_codec="lossless",
    compact=None,
    target={"name": "tiny", "weights": "abc"},
    engine={"name": "transformers", "version": "5"},
    max_length=200,
    conversation={"system_prompt": None, "sampling": {"temperature": 1.0}},
)


def states(rng, length, channels, dtype):
    """[T, channels] normal values in storage dtype."""
    values = rng.standard_normal((length, channels)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)


@pytest.fixture(autouse=True)
def fsynced(monkeypatch):
    """Paths that were flushed to the disk; nothing is flushed for real, which would take most of the tests' time."""
    paths = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: paths.add(os.readlink(f"/proc/self/fd/{descriptor}")))
    return paths


@pytest.fixture
def spec():
    return SPEC


@pytest.fixture
def make_spec():
    return lambda **changes: dataclasses.replace(SPEC, **changes)


@pytest.fixture
def make_row():
    def make(name, length=10, turns=((3, 5),), split="train", dtype="bfloat16", source="chat"):
        rng = np.random.default_rng([length, *name.encode()])
        row = TokenRow(name, source, split, rng.integers(0, V, length, dtype=np.int32), tuple(turns), ("stop",) * len(turns))
        kept = last_positions(row.turns, length)
        return CapturedRow(row, states(rng, length, len(LAYERS) * H, dtype), states(rng, length, H, dtype)[kept])

    return make


@pytest.fixture
def rows(make_row):
    """Rows that cross chunks (7 tokens) and shards (21 tokens) in every way: name -> captured row."""

    def make(dtype="bfloat16"):
        return {
            "a": make_row("a", 1, (), dtype=dtype),
            "b": make_row("b", 6, ((2, 6),), dtype=dtype),
            "c": make_row("c", 64, ((10, 20), (30, 64)), dtype=dtype, source="code"),
            "ü": make_row("ü", 7, ((0, 1),), dtype=dtype),
            "e": make_row("e", 30, ((29, 30),), "eval", dtype=dtype),
            "f": make_row("f", 12, ((5, 9),), "eval", dtype=dtype, source="math"),
        }

    return make


@pytest.fixture
def units():
    """What the dump fixture's plan says: row x is rejected."""
    return [(0, "train", ("a", "b", "x", "c")), (1, "train", ("ü",)), (2, "eval", ("f", "e"))]


@pytest.fixture
def put_target():
    def put(dump, value=1):
        wide = (np.arange(V * H) * value % 1000).astype(np.uint16).reshape(V, H)
        tensors = {"embed_tokens.weight": wide, "norm.weight": wide[0], "lm_head.weight": wide[::-1]}
        return write_target(dump, tensors, dict.fromkeys(tensors, "bfloat16"), {"config.json": b'{"a": 1}\n', "tokenizer.json": b"{}"})

    return put


@pytest.fixture
def write_parts(rows):
    """Write the sealed parts of the fixture's plan into `folder`; no manifest yet."""

    def write(folder, spec, sizes=SMALL, **options):
        captured = rows(spec.dtype)
        for unit, split, names in [(0, "train", "abc"), (1, "train", "ü"), (2, "eval", "ef")]:
            with PartWriter(folder, unit, split, spec, sizes=sizes, **options) as writer:
                for name in names:
                    writer.add(captured[name])
                if unit == 0:
                    writer.reject(Reject("too long", id="x"))
                writer.seal()

    return write


@pytest.fixture
def build(write_parts, put_target, units):
    """A whole sealed dump in `folder`."""

    def make(folder, spec=SPEC, **options):
        put_target(folder)
        write_parts(folder, spec, **options)
        seal(folder, spec, units)
        return folder

    return make


@pytest.fixture
def dump(build, tmp_path):
    return build(tmp_path / "dump")
