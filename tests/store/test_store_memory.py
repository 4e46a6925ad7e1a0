"""The writer's memory does not grow with its unit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eagle3_offline.store.background import QUEUE_BYTES

from ..campaign import SOAK

ROOT = Path(__file__).parents[2]
MB = 10**6
# tokens, hidden size, bytes that may wait, bytes that the process may grow by besides
UNIT = (100_000, 4096, QUEUE_BYTES, 700 * MB) if SOAK else (40_000, 1024, 16 << 20, 150 * MB)


@pytest.mark.campaign
@pytest.mark.parametrize("codec", ["none", "lossless", "int8"])
def test_a_unit_streams_through_bounded_memory(tmp_path, codec):
    tokens, hidden, queue, allowed = UNIT
    command = [sys.executable, "-m", "tests.store.stream_unit", tmp_path / "dump", tokens, hidden, codec, queue]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    for path in tmp_path.rglob("c.*"):
        path.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    raw = tokens * 4 * hidden * 2
    print(
        f"\n{codec}: {raw / MB:,.0f} MB, grew by {found['growth'] / MB:,.0f} MB, {found['seconds']} s, {found['stored_bytes']:,} B stored"
    )
    assert found["tokens"] == tokens and found["growth"] < queue + allowed < raw
