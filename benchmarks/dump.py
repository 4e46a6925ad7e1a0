"""What storing costs beside prefill: the same rows read by the engine alone, into the store, and into one torch.save a row.

    python benchmarks/dump.py --target tiny --engine sglang --rows 64 --tokens 200 --repeats 3

Prints one JSON line: median seconds of each way, the store's share of the wall time, rows a second. The three ways take turns on
one engine, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

from eagle3_offline.capture.dump import token_batches
from eagle3_offline.config import TargetConfig
from eagle3_offline.pipeline import target_folder
from eagle3_offline.records import CapturedRow, TokenRow
from eagle3_offline.store.background import BackgroundPart
from eagle3_offline.store.format import DumpSpec, last_positions
from eagle3_offline.store.writer import PartWriter
from eagle3_offline.target.engine import Engine, States, capture_layers
from eagle3_offline.target.folder import text_config
from eagle3_offline.target.sglang_engine import SglangEngine
from eagle3_offline.target.transformers_engine import TransformersEngine


def make_rows(count: int, tokens: int, vocabulary: int) -> list[TokenRow]:
    """Rows of random ids; the second half of each is its answer."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, vocabulary, size=tokens).astype(np.int32) for _ in range(count)]
    return [TokenRow(f"row-{n}", "random", "train", row, ((tokens // 2, tokens),), ("stop",)) for n, row in enumerate(ids)]


def nothing(_folder: Path, _spec: DumpSpec) -> tuple[Callable[[TokenRow, States], None], Callable[[], None]]:
    return lambda _row, _states: None, lambda: None


def per_sample(folder: Path, _spec: DumpSpec) -> tuple[Callable[[TokenRow, States], None], Callable[[], None]]:
    """One file a row, as others do."""

    def save(row: TokenRow, states: States) -> None:
        tensors = {"input_ids": torch.from_numpy(row.input_ids), "loss_mask": torch.from_numpy(row.loss_mask)}
        aux = torch.from_numpy(np.concatenate(list(states.aux.values()), axis=1))
        torch.save({**tensors, "aux": aux, "last": torch.from_numpy(states.last)}, folder / f"{row.id}.pt")

    return save, lambda: None


def store(folder: Path, spec: DumpSpec) -> tuple[Callable[[TokenRow, States], None], Callable[[], None]]:
    """The store's part, written beside the engine and sealed at the end, as `dump-hidden` does."""
    part = PartWriter(folder, 0, "train", spec, scratch=folder / "sending")
    background = BackgroundPart(part)
    background.__enter__()

    def add(row: TokenRow, states: States) -> None:
        background.add(CapturedRow(row, states.side_by_side(), states.last[last_positions(row.turns, len(row.input_ids))]))

    def close() -> None:
        rejects = background.finish()
        assert not rejects, rejects
        part.seal()
        background.__exit__(None, None, None)

    return add, close


def timed(engine: Engine, batches: list[list[TokenRow]], sink: Callable, spec: DumpSpec) -> tuple[float, int]:
    """(seconds, bytes written) of one pass over all rows."""
    folder = Path(tempfile.mkdtemp(prefix="bench-dump-"))
    began = time.perf_counter()
    add, close = sink(folder, spec)
    for batch, captured in zip(batches, engine.prefill_batches([[row.input_ids for row in b] for b in batches]), strict=True):
        for row, states in zip(batch, captured, strict=True):
            add(row, states)
    close()
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return seconds, size


@click.command(help=__doc__)
@click.option("--target", default="tiny", show_default=True, help="tiny, smollm2, a folder or a hub name.")
@click.option("--engine", "engine_name", type=click.Choice(["sglang", "transformers"]), default="transformers", show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--rows", default=64, show_default=True)
@click.option("--tokens", default=200, show_default=True, help="Length of a row.")
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(target: str, engine_name: str, dtype: str, rows: int, tokens: int, batch_tokens: int, repeats: int) -> None:
    folder = target_folder(TargetConfig(model=target))
    shape = text_config(folder)
    layers = capture_layers([], shape["num_hidden_layers"])
    spec = DumpSpec(
        layers=layers, hidden_size=shape["hidden_size"], vocab_size=shape["vocab_size"], dtype=dtype,
        codec="lossless", last_codec="lossless", compact=None,
        target={}, engine={"name": engine_name}, max_length=tokens, conversation={},
    )  # fmt: skip
    batches = list(token_batches(make_rows(rows, tokens, shape["vocab_size"]), batch_tokens))
    if engine_name == "sglang":
        engine: Engine = SglangEngine(folder, layers, dtype, context=tokens, log=Path(tempfile.gettempdir()) / "bench-sglang.log")
    else:
        engine = TransformersEngine(folder, layers, dtype)
    ways = {"prefill": nothing, "store": store, "torch_save": per_sample}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    try:
        timed(engine, batches, nothing, spec)  # warm up
        for _ in range(repeats):
            for name, sink in ways.items():
                found[name].append(timed(engine, batches, sink, spec))
    finally:
        engine.close()
    seconds = {name: statistics.median(s for s, _ in values) for name, values in found.items()}
    result = {
        "target": target, "engine": engine_name, "dtype": dtype, "rows": rows, "tokens": tokens,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "store_share": round(1 - seconds["prefill"] / seconds["store"], 4),
        "rows_per_second": {name: round(rows / value, 1) for name, value in seconds.items()},
        "bytes": {name: values[-1][1] for name, values in found.items()},
    }  # fmt: skip
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
