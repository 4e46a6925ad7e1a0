"""Streams a unit of random rows through the writer, and prints how much memory that took beyond the imports.

`python -m tests.store.stream_unit DUMP TOKENS HIDDEN CODEC QUEUE_BYTES`
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np

from eagle3_offline.records import CapturedRow, TokenRow
from eagle3_offline.store.background import BackgroundPart
from eagle3_offline.store.format import DumpSpec
from eagle3_offline.store.writer import PartWriter

ROW, LAYERS, VOCABULARY = 1000, (2, 16, 29), 1000
FINITE = 0x3FFF  # of bfloat16's bits: values below 2


def spec_of(hidden: int, codec: str) -> DumpSpec:
    return DumpSpec(
        layers=LAYERS, hidden_size=hidden, vocab_size=VOCABULARY, dtype="bfloat16", codec=codec, last_codec=codec, compact=None,
        target={}, engine={}, max_length=ROW, conversation={},
    )  # fmt: skip


def row_of(rng: np.random.Generator, number: int, hidden: int) -> CapturedRow:
    """All tokens but the first are an answer, so that all last states are kept."""
    ids = rng.integers(0, VOCABULARY, ROW, dtype=np.int32)
    row = TokenRow(f"row-{number}", "random", "train", ids, ((1, ROW),), ("stop",))
    bits = np.frombuffer(rng.bytes(ROW * (len(LAYERS) + 1) * hidden * 2), np.uint16) & np.uint16(FINITE)
    aux, last = np.split(bits.reshape(ROW, -1), [len(LAYERS) * hidden], axis=1)
    return CapturedRow(row, aux, last)


def peak_bytes() -> int:
    """Of this program: ru_maxrss would begin with what the process had before it became this program."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def main(dump: str, tokens: int, hidden: int, codec: str, queue_bytes: int) -> None:
    rng, before, started = np.random.default_rng(0), peak_bytes(), time.monotonic()
    with BackgroundPart(PartWriter(dump, 0, "train", spec_of(hidden, codec), threads=2), queue_bytes) as background:
        for number in range(tokens // ROW):
            background.add(row_of(rng, number, hidden))
        assert background.finish() == []
        counts = background.part.seal()["counts"]
    print(json.dumps({"growth": peak_bytes() - before, "seconds": round(time.monotonic() - started, 1), **counts}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
