"""What storing costs beside prefill: the same rows read by the engine alone, into the store, and into one torch.save a row.

    python benchmarks/dump.py --target tiny --engine sglang --rows 64 --tokens 200 --repeats 3

Ways, taking turns on one engine, so that what else the machine does hits all of them:

    bare        a forward pass; nothing leaves the engine
    captured    the states reach this process, which drops them
    lossless    into the store, as `dump-hidden` does: written beside the engine, sealed at the end
    compact     the same, reduced on the engine's device (projection to H / 4 channels, 16 logits a teacher), int8
    torch_save  all states into one file a row, as others do

Prints one JSON line: median seconds of each way, the share of the wall time that is not bare prefill, rows a second, bytes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import httpx
import numpy as np
import torch

from eagle3_offline.capture.compact import make_reducer
from eagle3_offline.capture.dump import capture, token_batches
from eagle3_offline.config import TargetConfig
from eagle3_offline.pipeline import target_folder
from eagle3_offline.records import TokenRow
from eagle3_offline.store.background import BackgroundPart
from eagle3_offline.store.format import Compact, DumpSpec
from eagle3_offline.store.writer import PartWriter
from eagle3_offline.target.engine import Engine, capture_layers
from eagle3_offline.target.folder import head_tensors, text_config
from eagle3_offline.target.sglang_engine import AHEAD, SglangEngine
from eagle3_offline.target.transformers_engine import TransformersEngine

Batches = list[list[TokenRow]]


def make_rows(count: int, tokens: int, vocabulary: int) -> list[TokenRow]:
    """Rows of random ids; the second half of each is its answer."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, vocabulary, size=tokens).astype(np.int32) for _ in range(count)]
    return [TokenRow(f"row-{n}", "random", "train", row, ((tokens // 2, tokens),), ("stop",)) for n, row in enumerate(ids)]


def make_specs(shape: dict, layers: tuple[int, ...], dtype: str, engine: str, tokens: int) -> dict[str, DumpSpec]:
    """Of the two modes of a dump."""
    shared = {
        "layers": layers, "hidden_size": shape["hidden_size"], "vocab_size": shape["vocab_size"], "dtype": dtype, "target": {},
        "engine": {"name": engine}, "max_length": tokens, "conversation": {},
    }  # fmt: skip
    return {
        "lossless": DumpSpec(codec="lossless", last_codec="lossless", compact=None, **shared),
        "compact": DumpSpec(codec="int8", last_codec=None, compact=Compact(shape["hidden_size"] // 4, 16, "none"), **shared),
    }


def random_basis(spec: DumpSpec) -> dict[str, np.ndarray]:
    """As good as a fitted one for the time that it takes."""
    channels = len(spec.layers) * spec.hidden_size
    components = np.linalg.qr(np.random.default_rng(0).standard_normal((channels, spec.compact.rank)))[0]
    return {"components": components.astype(np.float32), "scale": np.ones(channels, np.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# The ways: each reads all batches; the folder is for its files


def bare(engine: Engine, batches: Batches, _folder: Path) -> None:
    if isinstance(engine, TransformersEngine):
        with torch.inference_mode():
            for batch in batches:
                list(engine.states([row.input_ids for row in batch]))
        return

    def ask(batch: list[TokenRow]) -> None:  # with request ids that are not ours, so nothing is captured
        ids = [row.input_ids.tolist() for row in batch]
        sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
        httpx.post(f"{engine.url}/generate", json={"input_ids": ids, "sampling_params": sampling}, timeout=None).raise_for_status()

    with ThreadPoolExecutor(AHEAD) as pool:
        list(pool.map(ask, batches))


def captured(engine: Engine, batches: Batches, _folder: Path) -> None:
    for _ in engine.prefill_batches([[row.input_ids for row in batch] for batch in batches]):
        pass


def into_store(spec: DumpSpec) -> Callable[[Engine, Batches, Path], None]:
    def write(engine: Engine, batches: Batches, folder: Path) -> None:
        part = PartWriter(folder, 0, "train", spec, scratch=folder / "sending")
        with BackgroundPart(part) as background:
            for rows in capture(engine, spec, batches):
                for row in rows:
                    background.add(row)
            rejects = background.finish()
            assert not rejects, rejects
            part.seal()

    return write


def torch_save(engine: Engine, batches: Batches, folder: Path) -> None:
    found = engine.prefill_batches([[row.input_ids for row in batch] for batch in batches])
    for batch, batch_states in zip(batches, found, strict=True):
        for row, states in zip(batch, batch_states, strict=True):
            tensors = {"input_ids": row.input_ids, "loss_mask": row.loss_mask, "aux": states.side_by_side(), "last": states.last}
            torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / f"{row.id}.pt")


def timed(way: Callable[[Engine, Batches, Path], None], engine: Engine, batches: Batches) -> tuple[float, int]:
    """(seconds, bytes written) of one pass over all rows."""
    folder = Path(tempfile.mkdtemp(prefix="bench-dump-"))
    began = time.perf_counter()
    way(engine, batches, folder)
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
    specs = make_specs(shape, layers, dtype, engine_name, tokens)
    reducer = make_reducer(specs["compact"], random_basis(specs["compact"]), head_tensors(folder, dtype)["lm_head.weight"])
    batches = list(token_batches(make_rows(rows, tokens, shape["vocab_size"]), batch_tokens))
    if engine_name == "sglang":
        log = Path(tempfile.gettempdir()) / "bench-sglang.log"
        engine: Engine = SglangEngine(folder, layers, dtype, context=tokens, log=log, reducer=reducer)
    else:
        engine = TransformersEngine(folder, layers, dtype, reducer=reducer)
    ways = {"bare": bare, "captured": captured, **{name: into_store(spec) for name, spec in specs.items()}, "torch_save": torch_save}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    try:
        for way in ways.values():  # warm up
            timed(way, engine, batches[:1])
        for _ in range(repeats):
            for name, way in ways.items():
                found[name].append(timed(way, engine, batches))
    finally:
        engine.close()
    seconds = {name: statistics.median(s for s, _ in values) for name, values in found.items()}
    result = {
        "target": target, "engine": engine_name, "dtype": dtype, "rows": rows, "tokens": tokens, "batches": len(batches),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "spread": {name: [round(s, 3) for s, _ in values] for name, values in found.items()},
        "share": {name: round(1 - seconds["bare"] / value, 4) for name, value in seconds.items()},
        "rows_per_second": {name: round(rows / value, 1) for name, value in seconds.items()},
        "bytes": {name: values[-1][1] for name, values in found.items()},
    }  # fmt: skip
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
