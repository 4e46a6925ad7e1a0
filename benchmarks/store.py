"""The store against what peers write, as ratios in one run: bytes, reading and writing.

    python benchmarks/store.py --dump runs/demo/dump --scratch store-bench > store.json
    python benchmarks/store.py --rows 48 --cold

--dump: a sealed lossless dump of a real target (its states are measured); without it only synthetic 8B-shaped rows are.
Every figure is a median over rounds in which all contestants take turns; reading from the page cache is on one core.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import zarr

from eagle3_offline.capture.degrade import degrade
from eagle3_offline.config import DumpConfig
from eagle3_offline.records import CapturedRow, TokenRow
from eagle3_offline.runs import StopSignal
from eagle3_offline.store.format import DumpSpec, last_positions
from eagle3_offline.store.info import info
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.reference import read_sample_with_zarr
from eagle3_offline.store.seal import seal
from eagle3_offline.store.target_files import write_target
from eagle3_offline.store.writer import PartWriter

HIDDEN, LAYERS, VOCAB = 4096, (2, 16, 29), 128
ROUNDS, COLD_ROUNDS = 5, 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("store-bench"))
    parser.add_argument("--rows", type=int, default=32, help="8B-shaped rows of about 600 tokens")
    parser.add_argument("--cold", action="store_true", help="only the reading from the disk")
    options = parser.parse_args()
    shutil.rmtree(options.scratch, ignore_errors=True)
    options.scratch.mkdir(parents=True)
    rows = list(rows_of_8b_shape(options.rows))
    report: dict[str, Any] = {"machine": machine(), "rows_8b": len(rows), "tokens_8b": sum(len(row.aux) for row in rows)}
    if options.cold:
        write_raw(rows, options.scratch / "raw")
        write_dump(rows, options.scratch / "lossless", "lossless", 2)
    else:
        report["write"] = writing(rows, options.scratch)
        with one_core():
            report["read_warm"] = reading(rows, options.scratch)
        report["bytes_8b"] = {
            codec: bytes_of(options.scratch / codec) for codec in ("lossless", "lossless-fast", "int8", "fp8", "bitround")
        }
    report["read_cold"] = cold(options.scratch)
    if options.dump:
        report["bytes_real"] = real_target(options.dump, options.scratch)
    print(json.dumps(report, indent=1))
    shutil.rmtree(options.scratch)


def machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "zarr": zarr.__version__,
    }


class one_core:  # noqa: N801
    """Within the block this process runs on one core, so that no contestant is helped by threads."""

    def __enter__(self) -> None:
        self.before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self.before)})
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        os.sched_setaffinity(0, self.before)


# ---------------------------------------------------------------------------------------------------------------------
# 8B-shaped rows


def spec_8b(codec: str) -> DumpSpec:
    return DumpSpec(
        layers=LAYERS, hidden_size=HIDDEN, vocab_size=VOCAB, dtype="bfloat16", codec=codec, last_codec=codec, compact=None,
        target={}, engine={}, max_length=4096, conversation={},
    )  # fmt: skip


def rows_of_8b_shape(count: int):
    """Normal values, channels and tokens of different sizes, as the states of a real target have them. 70 % supervised."""
    rng = np.random.default_rng(0)
    channels = np.exp(0.6 * rng.standard_normal(4 * HIDDEN)).astype(np.float32)
    for number in range(count):
        length = int(rng.integers(300, 900))
        tokens = np.exp(0.2 * rng.standard_normal((length, 1))).astype(np.float32)
        states = (rng.standard_normal((length, 4 * HIDDEN), np.float32) * channels * tokens).astype(ml_dtypes.bfloat16).view(np.uint16)
        turns = ((int(length * 0.3), length),)
        row = TokenRow(f"row-{number}", "synthetic", "train", rng.integers(0, VOCAB, length, dtype=np.int32), turns, ("stop",))
        yield CapturedRow(row, states[:, : 3 * HIDDEN], states[last_positions(turns, length), 3 * HIDDEN :])


def raw_bytes(rows: list[CapturedRow]) -> int:
    return sum(row.aux.nbytes + row.last.nbytes for row in rows)


def write_dump(rows: list[CapturedRow], folder: Path, codec: str, threads: int) -> None:
    spec = spec_8b(codec)
    wide = np.zeros((VOCAB, HIDDEN), np.uint16)
    tensors = {"embed_tokens.weight": wide, "norm.weight": wide[0], "lm_head.weight": wide}
    write_target(folder, tensors, dict.fromkeys(tensors, "bfloat16"), {"config.json": b"{}"})
    with PartWriter(folder, 0, "train", spec, threads=threads) as part:
        for row in rows:
            part.add(row)
        part.seal()
    seal(folder, spec, [(0, "train", tuple(row.row.id for row in rows))])


def specforge_sample(row: CapturedRow) -> dict[str, torch.Tensor]:
    """What SpecForge writes of a row; here with the last states that the store keeps, so that both move the same bytes."""
    aux, last = (torch.from_numpy(states).view(torch.bfloat16)[None] for states in (row.aux, row.last))
    ids = torch.from_numpy(row.row.input_ids).long()
    return {"input_ids": ids, "loss_mask": torch.from_numpy(row.row.loss_mask).long(), "hidden_state": last, "aux_hidden_state": aux}


def write_ckpt(rows: list[CapturedRow], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        torch.save(specforge_sample(row), folder / f"data_{number}.ckpt")


def write_ckpt_gz(rows: list[CapturedRow], folder: Path) -> None:
    """gzip at SpecForge's own level, 6."""
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        with gzip.open(folder / f"data_{number}.ckpt.gz", "wb", compresslevel=6) as handle:
            torch.save(specforge_sample(row), handle)


def write_raw(rows: list[CapturedRow], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        np.concatenate([row.aux.ravel(), row.last.ravel()]).tofile(folder / f"data_{number}.bin")


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def writing(rows: list[CapturedRow], scratch: Path) -> dict[str, Any]:
    """MB/s of raw states. The store's figures include row checks, digests and fsync; peers have none of these."""
    few = rows[:4]  # gzip takes seconds a row
    rates: dict[str, list[float]] = {}
    for _ in range(3):
        for name, work, some in (
            ("ckpt.gz", lambda: write_ckpt_gz(few, scratch / "gz"), few),
            ("lossless, no threads", lambda: write_dump(rows, scratch / "w0", "lossless", 0), rows),
            ("lossless, 2 threads", lambda: write_dump(rows, scratch / "w2", "lossless", 2), rows),
            ("ckpt", lambda: write_ckpt(rows, scratch / "ckpt"), rows),
        ):
            for folder in ("gz", "w0", "w2", "ckpt"):
                shutil.rmtree(scratch / folder, ignore_errors=True)
            rates.setdefault(name, []).append(raw_bytes(some) / seconds(work) / 1e6)
    result = {name: statistics.median(values) for name, values in rates.items()}
    result["lossless / ckpt.gz"] = result["lossless, 2 threads"] / result["ckpt.gz"]
    result["lossless, no threads / ckpt.gz"] = result["lossless, no threads"] / result["ckpt.gz"]
    return result


def reading(rows: list[CapturedRow], scratch: Path) -> dict[str, Any]:
    """Random whole samples, page cache warm, MB/s of raw states."""
    write_ckpt_gz(rows[:6], scratch / "gz")
    write_ckpt(rows, scratch / "ckpt")
    write_raw(rows, scratch / "raw")
    for codec in ("lossless", "lossless-fast", "none", "int8", "fp8", "bitround"):
        write_dump(rows, scratch / codec, codec, 0)
    memory = np.empty((900, 3 * HIDDEN), np.uint16)
    dumps = {codec: Dump.open(scratch / codec) for codec in ("lossless", "lossless-fast", "none", "int8", "fp8", "bitround")}
    readers: dict[str, Callable[[int], Any]] = {
        "ckpt.gz": lambda i: load_gz(scratch / "gz" / f"data_{i % 6}.ckpt.gz"),
        "ckpt, mmap": lambda i: touch(torch.load(scratch / "ckpt" / f"data_{i}.ckpt", mmap=True, weights_only=True)),
        "memmap of raw": lambda i: np.array(np.memmap(scratch / "raw" / f"data_{i}.bin", np.uint16, "r")),
        "zarr-python, lossless": lambda i: read_sample_with_zarr(scratch / "lossless", i),
        **{codec: (lambda i, dump=dump: dump.sample(i)) for codec, dump in dumps.items()},
        "lossless, memory used again": lambda i: dumps["lossless"].sample(i, aux=memory),
    }
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            chosen = order[:4] if name in ("ckpt.gz", "zarr-python, lossless") else order
            size = sum(raw_bytes([rows[i % 6 if name == "ckpt.gz" else i]]) for i in chosen)
            rates[name].append(size / seconds(lambda read=read, chosen=chosen: [read(i) for i in chosen]) / 1e6)
    result: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    best = result["lossless, memory used again"]
    result |= {"lossless / ckpt.gz": best / result["ckpt.gz"], "lossless / zarr-python": best / result["zarr-python, lossless"]}
    return result


def load_gz(path: Path) -> Any:
    """The whole file is decompressed first: torch.load reads backwards, which gzip would pay for with another pass."""
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)


def touch(sample: dict[str, torch.Tensor]) -> None:
    """Bring a mapped sample into memory."""
    for tensor in sample.values():
        tensor.clone()


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_bytes() -> int:
    """Bytes that this process has fetched from the disk."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")).split()[1])


def cold(scratch: Path) -> dict[str, Any]:
    """Random whole samples from the disk, against copying the raw files through memory maps, in one and in two threads.

    Not on one core: the kernel's reading takes part of it. 'not measured' where the page cache stays.
    """
    dump = Dump.open(scratch / "lossless")
    order = np.random.default_rng(1).permutation(len(dump)).tolist()
    raw = sum((scratch / "raw" / f"data_{i}.bin").stat().st_size for i in order)
    readers = {
        "lossless": ("c.*", lambda threads: deque(dump.samples(order, threads=threads, reuse=True), 0)),
        "raw": ("*.bin", lambda threads: copy_raw(scratch / "raw", order, threads)),
    }
    rates: dict[str, list[float]] = {}
    for _ in range(COLD_ROUNDS):
        for threads in (1, 2):
            for name, (files, read) in readers.items():
                drop_cache(scratch / name)
                stored = sum(path.stat().st_size for path in (scratch / name).rglob(files))
                before = read_bytes()
                took = seconds(lambda read=read, threads=threads: read(threads))
                if read_bytes() - before < 0.9 * stored:
                    return {"not measured": f"{name}: only {read_bytes() - before} of {stored} bytes came from the disk"}
                rates.setdefault(f"{name}, {threads}", []).append(raw / took / 1e6)
    result: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    for ours, theirs in ((1, 1), (2, 2), (2, 1)):
        pairs = [a / b for a, b in zip(rates[f"lossless, {ours}"], rates[f"raw, {theirs}"], strict=True)]
        result[f"lossless, {ours} / memmap, {theirs}"] = {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}
    return result


def copy_raw(folder: Path, order: list[int], threads: int) -> None:
    """Copy every sample out of its memory map, thread t of n every n-th one, into memory that is used again, as the store's is."""

    def share(thread: int) -> None:
        memory = np.empty(max((folder / f"data_{i}.bin").stat().st_size for i in order) // 2, np.uint16)
        for i in order[thread::threads]:
            sample = np.memmap(folder / f"data_{i}.bin", np.uint16, "r")
            memory[: len(sample)] = sample

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def bytes_of(folder: Path) -> dict[str, Any]:
    """Ratio to the raw states beside the bound of order-0 coding of each byte plane."""
    arrays = info(folder)["arrays"]
    states = {name: array for name, array in arrays.items() if "ratio" in array}
    return {"ratio": {name: array["ratio"] for name, array in states.items()}, **_against_entropy(states)}


def _against_entropy(states: dict[str, dict[str, float]]) -> dict[str, float]:
    if not all("entropy_ratio" in array for array in states.values()):
        return {}
    raw = {name: array["bytes"] * array["ratio"] for name, array in states.items()}
    stored = sum(array["bytes"] for array in states.values())
    bound = sum(raw[name] / array["entropy_ratio"] for name, array in states.items())
    return {"ratio_of_all": sum(raw.values()) / stored, "bound": sum(raw.values()) / bound, "ratio / bound": bound / stored}


def real_target(dump: Path, scratch: Path) -> dict[str, Any]:
    """Every mode made from a lossless dump of a real target, in bytes as a share of the raw ones (8 H a token with three layers)."""
    source = info(dump)
    shares = {"lossless": {"share_of_raw": source["share_of_raw"], "supervised": source["supervised_share"], **bytes_of(dump)}}
    arrays = {name: array for name, array in source["arrays"].items() if "ratio" in array}
    tokens, raw = source["tokens"], source["stored_bytes"] / source["share_of_raw"] / source["tokens"]
    aux = sum(array["bytes"] for name, array in arrays.items() if name != "last") / tokens
    last = arrays["last"]["bytes"] / (source["supervised_share"] * tokens)
    shares["lossless"]["share_of_raw at 60 % supervised"] = (aux + 0.6 * last + 8) / raw  # 8: ids, mask and tables, rounded up
    modes = {
        "lossless-fast": DumpConfig(codec="lossless-fast"),
        "int8": DumpConfig(codec="int8"),
        "fp8": DumpConfig(codec="fp8"),
        "bitround": DumpConfig(codec="bitround"),
        "int8 aux, lossless last": DumpConfig(codec="int8", last_codec="lossless"),
        "compact r=H int8 top-64": DumpConfig(mode="compact", rank=1.0, top_k=64),
        "compact r=H/2 int8 top-32": DumpConfig(mode="compact", rank=0.5, top_k=32),
        "compact r=H/4 int8 top-16": DumpConfig(mode="compact", rank=0.25, top_k=16),
        "compact r=H/8 int8 top-8": DumpConfig(mode="compact", rank=0.125, top_k=8),
    }
    for name, config in modes.items():
        folder = scratch / "degraded"
        shutil.rmtree(folder, ignore_errors=True)
        print(name, file=sys.stderr)
        took = seconds(lambda folder=folder, config=config: degrade(dump, folder, replace(config, writer_threads=2), StopSignal()))
        shares[name] = {"share_of_raw": info(folder)["share_of_raw"], "seconds": took, "relative error": _error(dump, folder)}
    return shares


def _error(exact: Path, lossy: Path) -> float | None:
    """rms error over rms of a captured channel, the median channel, over some rows; None where they are projected."""
    one, other = Dump.open(exact), Dump.open(lossy)
    if other.spec.compact:
        return None
    lost, total = np.zeros(one.spec.aux_channels), np.zeros(one.spec.aux_channels)
    for i in range(0, len(one), max(1, len(one) // 50)):
        wanted, found = (dump.sample(i).aux.view(ml_dtypes.bfloat16).astype(np.float64) for dump in (one, other))
        lost, total = lost + ((wanted - found) ** 2).sum(0), total + (wanted**2).sum(0)
    return float(np.median(np.sqrt(lost / total)))


if __name__ == "__main__":
    main()
