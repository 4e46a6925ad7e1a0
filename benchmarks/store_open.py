"""What opening a dump costs, and reading a sample of it, in a dump of a thousand rows and in one of a million.

    python benchmarks/store_open.py [--rows 1000000] [--folder DIR]

The parts of the large dump are hard links to the files of two real ones, so that it has as many files as a real one and few bytes. All is
in the page cache: this measures the reader, not a disk. Prints JSON, one object a dump; each dump is read in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from eagle3_offline.records import CapturedRow, TokenRow
from eagle3_offline.runs import digest, unit_name
from eagle3_offline.store.files import record_of, tensor_bytes
from eagle3_offline.store.format import MANIFEST, ROWS, DumpSpec, json_bytes, last_positions, with_digest
from eagle3_offline.store.reader import Dump, read_manifest
from eagle3_offline.store.seal import seal
from eagle3_offline.store.target_files import write_target
from eagle3_offline.store.writer import PartWriter

HIDDEN, VOCABULARY, LENGTH, PART_ROWS = 256, 1000, 64, 2000
SAMPLES = 3000
SPEC = DumpSpec(
    layers=(2, 16, 29), hidden_size=HIDDEN, vocab_size=VOCABULARY, dtype="bfloat16", codec="lossless", last_codec="lossless",
    compact=None, target={}, engine={}, max_length=LENGTH, conversation={},
)  # fmt: skip


def make_small(folder: Path, parts: int, rows: int) -> None:
    """A real dump of random rows."""
    rng = np.random.default_rng(0)
    wide = np.zeros((VOCABULARY, HIDDEN), np.uint16)
    tensors = {"embed_tokens.weight": wide, "norm.weight": wide[0], "lm_head.weight": wide}
    write_target(folder, tensors, dict.fromkeys(tensors, "bfloat16"), {"config.json": b"{}"})
    turns = ((LENGTH // 4, LENGTH),)
    kept = last_positions(turns, LENGTH)
    units = []
    for unit in range(parts):
        ids = [f"conversation-{unit:04d}-{number:06d}" for number in range(rows)]
        with PartWriter(folder, unit, "train", SPEC, threads=2) as part:
            for name in ids:
                row = TokenRow(name, "random", "train", rng.integers(0, VOCABULARY, LENGTH, dtype=np.int32), turns, ("stop",))
                states = rng.standard_normal((LENGTH, 4 * HIDDEN), np.float32).view(np.uint32) >> 16
                aux, last = np.split(states.astype(np.uint16), [3 * HIDDEN], axis=1)
                part.add(CapturedRow(row, aux, last[kept]))
            part.seal()
        units.append((unit, "train", tuple(ids)))
    seal(folder, SPEC, units)


def make_large(folder: Path, small: Path, rows: int) -> None:
    """A dump of so many rows, whose parts are those of `small` again and again."""
    source, manifest = Dump.open(small), read_manifest(small)
    parts = rows // PART_ROWS
    entries = []
    link_folder(small / "target", folder / "target")
    for unit in range(parts):
        entry = manifest["parts"][unit % len(manifest["parts"])]
        link_folder(small / "parts" / entry["name"], folder / "parts" / unit_name(unit))
        entries.append({**entry, "name": unit_name(unit), "unit": unit})
    ids = [f"conversation-{unit:04d}-{number:06d}".encode() for unit in range(parts) for number in range(PART_ROWS)]
    columns = {
        name: np.tile(source._rows[name][:PART_ROWS], parts) for name in ("row", "token_offset", "length", "supervised", "split", "source")
    }
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    part = np.repeat(np.arange(parts, dtype=np.int32), PART_ROWS)
    table = tensor_bytes({"id_bytes": np.frombuffer(b"".join(ids), np.uint8), "id_offsets": offsets, "part": part, **columns})
    (folder / ROWS).write_bytes(table)
    os.link(small / "statistics.safetensors", folder / "statistics.safetensors")
    manifest = {**manifest, "parts": entries, "files": {**manifest["files"], ROWS: record_of(table)}, "rows_digest": digest([])}
    manifest.pop("digest")
    (folder / MANIFEST).write_bytes(json_bytes(with_digest(manifest)))


def link_folder(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target / file.relative_to(source))


def peak_mb() -> float:
    """Of this program: ru_maxrss would begin with what the process had before it became this program."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def measure(folder: Path) -> dict:
    """In a process that has done nothing else."""
    before, started = peak_mb(), time.perf_counter()
    dump = Dump.open(folder)
    opened = time.perf_counter() - started
    found = {"rows": len(dump), "parts": len(dump.manifest["parts"]), "open_s": opened, "rss_imports_mb": before, "rss_open_mb": peak_mb()}
    started = time.perf_counter()
    for part in range(len(dump.manifest["parts"])):
        dump.sample(int(np.searchsorted(dump.parts, part)))
    found["first_touch_of_a_part_ms"] = (time.perf_counter() - started) * 1e3 / found["parts"]
    wall, cpu = [], []
    for i in np.random.default_rng(0).integers(0, len(dump), SAMPLES).tolist():
        begun, used = time.perf_counter(), time.process_time()
        dump.sample(i)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    found |= {"sample_median_us": float(np.median(wall)) * 1e6, "sample_cpu_mean_us": float(np.mean(cpu)) * 1e6}
    return {name: round(value, 3) for name, value in {**found, "rss_all_parts_mb": peak_mb()}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large dump, a multiple of 2,000")
    parser.add_argument("--folder", type=Path, help="where the dumps are made, and removed  [default: the temporary folder]")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_small(folder / "thousand", 1, 1000)
        make_small(folder / "source", 2, PART_ROWS)
        make_large(folder / "large", folder / "source", options.rows)
        for dump in ("thousand", "large", "thousand", "large"):  # twice: the machine may be busy
            subprocess.run([sys.executable, __file__, "--measure", folder / dump], check=True)


if __name__ == "__main__":
    main()
