"""Small dumps of every kind, the same bytes whoever writes them. Legend: T tokens, H hidden size, V vocabulary, k kept logits."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np

from eagle3_offline.records import CapturedRow, Reject, Sample, TokenRow, TopLogits
from eagle3_offline.store.files import record_of, tensor_bytes
from eagle3_offline.store.format import Compact, DumpSpec, Sizes, last_positions
from eagle3_offline.store.places import Place
from eagle3_offline.store.seal import seal
from eagle3_offline.store.target_files import write_target
from eagle3_offline.store.writer import PartWriter

H, V, LAYERS, RANK, TOP_K = 16, 50, (2, 15), 8, 4
SIZES = Sizes(chunk_bytes=7 * H * 2, shard_bytes=3 * 7 * H * 2)  # so that rows cross chunks and shards
KINDS = ("lossless", "int8", "compact")
ROWS = 6  # of each unit, the last of them rejected
BASIS = {
    "components": np.linspace(-1, 1, len(LAYERS) * H * RANK).reshape(-1, RANK),
    "scale": np.ones(len(LAYERS) * H),
}


def spec_of(kind: str) -> DumpSpec:
    compact = Compact(RANK, TOP_K, record_of(tensor_bytes(BASIS))["xxh3_128"]) if kind == "compact" else None
    return DumpSpec(
        layers=LAYERS,
        hidden_size=H,
        vocab_size=V,
        dtype="bfloat16",
        codec="lossless" if kind == "lossless" else "int8",
        last_codec={"lossless": "lossless", "int8": "int8", "compact": None}[kind],
        compact=compact,
        target={"name": "tiny"},
        engine={"name": "transformers"},
        max_length=200,
        conversation={},
    )


def row_of(spec: DumpSpec, unit: int, number: int) -> CapturedRow:
    """A row with one outlier token and one channel that int8 misses, so that everything kept beside the codes is there."""
    rng = np.random.default_rng([unit, number])
    length = int(rng.integers(8, 60))
    turns = ((3, 3 + length // 3), (length - 2, length))
    ids = rng.integers(0, V, length, dtype=np.int32)
    row = TokenRow(f"u{unit}-r{number}", "chat", "train", ids, turns, ("stop", "length"))
    aux = rng.standard_normal((length, spec.aux_channels))
    aux[5] *= 40
    aux[:, 3] *= np.where(np.arange(length) == 1, 1.0, 1e-3)
    last = rng.standard_normal((length, H))[last_positions(turns, length)]
    aux, last = (values.astype(ml_dtypes.bfloat16).view(np.uint16) for values in (aux, last))
    if spec.compact is None:
        return CapturedRow(row, aux, last)
    top_ids = rng.integers(0, V, (len(last), TOP_K), dtype=np.int32)
    log_probs = -rng.random((len(last), TOP_K)).astype(np.float16)
    return CapturedRow(row, aux, None, TopLogits(top_ids, log_probs, rng.random(len(last)).astype(np.float32)))


def planned(unit: int) -> tuple[str, ...]:
    return tuple(f"u{unit}-r{number}" for number in range(ROWS))


def write_unit(dump: Place | Path | str, spec: DumpSpec, unit: int, **options: object) -> None:
    with PartWriter(dump, unit, "train", spec, sizes=SIZES, **options) as part:
        for number in range(ROWS - 1):
            part.add(row_of(spec, unit, number))
        part.reject(Reject("too long", id=f"u{unit}-r{ROWS - 1}"))
        part.seal()


def put_target(dump: Place | Path | str, spec: DumpSpec) -> None:
    wide = (np.arange(V * H) % 1000).astype(np.uint16).reshape(V, H)
    tensors = {"embed_tokens.weight": wide, "norm.weight": wide[0], "lm_head.weight": wide[::-1]}
    write_target(dump, tensors, dict.fromkeys(tensors, "bfloat16"), {"config.json": b'{"a": 1}\n'}, BASIS if spec.compact else None)


def seal_units(dump: Place | Path | str, spec: DumpSpec, units: int) -> dict:
    return seal(dump, spec, [(unit, "train", planned(unit)) for unit in range(units)])


def make_dump(dump: Place | Path | str, kind: str, units: int = 2, **options: object) -> Place | Path | str:
    """A sealed dump of that kind."""
    spec = spec_of(kind)
    put_target(dump, spec)
    for unit in range(units):
        write_unit(dump, spec, unit, **options)
    seal_units(dump, spec, units)
    return dump


def digest_of(sample: Sample) -> str:
    """Everything that a sample holds."""
    arrays = [sample.input_ids, sample.aux, sample.last_positions]
    arrays += [sample.last] if sample.top is None else [sample.top.ids, sample.top.log_probs, sample.top.log_normaliser]
    state = hashlib.sha256(f"{sample.id} {sample.turns}".encode())
    for array in arrays:
        state.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return state.hexdigest()
