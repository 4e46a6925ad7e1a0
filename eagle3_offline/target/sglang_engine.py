"""The production engine: SGLang in processes of its own, asked over HTTP; hidden states come back through shared memory.

Token ids are a few kilobytes and go as JSON; states are megabytes a row, so the scheduler writes them to files in memory
(see `sglang_hook`) and this process reads and removes them. Legend: T tokens of a row, S states, H hidden size.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from ..records import EngineFailed, TopLogits, UserError
from .engine import Asked, Reduced, States
from .folder import final_norm, text_config
from .reduction import Reducer
from .sglang_hook import ERROR, NORM, REDUCER, RID, CaptureError, hook_specs, read_row, write_teachers
from .sglang_server import LONGER, SglangServer, check_options, command_line, cpu_options, require_tested_version

AHEAD = 2  # batches that the engine has at once: it works on one while the caller stores the other
SHARED_MEMORY = Path("/dev/shm")
STALE_SECONDS = 60.0
NAME = "eagle3-offline-"


class SglangEngine:
    """Prefill capture. Raises EngineFailed when the server dies; then only a new engine can go on."""

    name = "sglang"

    def __init__(
        self,
        folder: Path,
        layers: tuple[int, ...],
        dtype: str,
        *,
        context: int,
        log: Path,
        options: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        batch_bytes: int = 1 << 28,
        reducer: Reducer | None = None,
    ):
        """folder: a Hugging Face folder; context: the longest row; options: SGLang's arguments; batch_bytes: states of a batch;
        reducer: for `reduced_batches`, on the host: the scheduler loads it onto its device.
        """
        self.version = require_tested_version()
        self.layers, self.dtype = layers, dtype
        check_options(options or {}, text_config(folder), capture=True)
        if 0 in layers and text_config(folder).get("model_type", "").startswith("gemma"):
            raise UserError(
                "boundary 0 of a Gemma is its scaled embedding, which no module of SGLang's returns: leave 0 out of target.layers"
            )
        self._scratch, self._lock = make_scratch(AHEAD * batch_bytes + (reducer.bytes if reducer else 0))
        np.save(self._scratch / "states" / NORM, final_norm(folder).numpy())
        if reducer is not None:
            reducer.save(self._scratch / "states" / REDUCER)
        cpu = not torch.cuda.is_available()
        words = command_line(
            {
                **generation_options(folder, dtype, context, trust_remote_code, cpu),
                "disable_radix_cache": True,  # a cached prefix is not computed again, so not captured
                "disable_cuda_graph": True,  # a replayed graph runs no hooks
                **(options or {}),
                "forward_hooks": hook_specs(layers, self._scratch / "states", dtype, text_config(folder)["num_hidden_layers"]),
            }
        )
        self._server = SglangServer(words, log, cpu, temporary=self._scratch / "tmp")
        self.url = self._server.url
        self._pool = ThreadPoolExecutor(AHEAD)
        self._http = httpx.Client(base_url=self._server.url, timeout=None)
        self._batches = 0
        try:
            self._server.start()
            self._server.wait_until_healthy()
            self.longest_row = self._http.get("/server_info").json()["max_req_input_len"] - 1
        except BaseException:
            self.close()
            raise

    def prefill_batches(self, batches: Iterable[list[np.ndarray]]) -> Iterator[list[States]]:
        """States of each batch of rows [T] int32, in order; the engine works on the next batch meanwhile."""
        for rows in self._read([Asked(ids, None) for ids in rows] for rows in batches):
            yield [States(dict(zip(self.layers, states[:-1], strict=True)), states[-1]) for (states,) in rows]

    def reduced_batches(self, batches: Iterable[list[Asked]]) -> Iterator[list[Reduced]]:
        """What a compact dump keeps of each batch of rows, in order."""
        for rows in self._read(batches):
            yield [Reduced(aux, TopLogits(ids, log_probs, normaliser[:, 0])) for aux, ids, log_probs, normaliser in rows]

    def _read(self, batches: Iterable[list[Asked]]) -> Iterator[list[list[np.ndarray]]]:
        """The arrays that the scheduler leaves of each row, batch by batch."""
        waiting: deque[tuple[str, list[Asked], Future]] = deque()
        try:
            for rows in batches:
                name = f"{RID}{self._batches}"
                self._batches += 1
                waiting.append((name, rows, self._pool.submit(self._ask, name, rows)))
                if len(waiting) == AHEAD:
                    yield self._take(*waiting.popleft())
            while waiting:
                yield self._take(*waiting.popleft())
        finally:
            for _, _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """Kill the server and remove what it left."""
        self._server.stop()
        self._pool.shutdown(cancel_futures=True)
        self._http.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        os.close(self._lock)

    def _ask(self, name: str, rows: list[Asked]) -> httpx.Response:
        sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}  # 0 tokens would return nothing
        rids = [f"{name}-{n}" for n in range(len(rows))]
        for rid, row in zip(rids, rows, strict=True):
            if row.teachers is not None:
                write_teachers(self._scratch / "states", rid, row)
        ids = [row.ids.tolist() for row in rows]
        return self._http.post("/generate", json={"rid": rids, "input_ids": ids, "sampling_params": sampling})

    def _take(self, name: str, rows: list[Asked], future: Future) -> list[list[np.ndarray]]:
        try:
            response = future.result()
        except httpx.TransportError as error:
            self._server.check(seconds=10)  # it may be about to end
            raise EngineFailed(f"SGLang broke the connection ({error}); its log is {self._server.log}") from None
        error = self._scratch / "states" / ERROR
        if error.is_file():
            raise UserError(f"hidden states cannot be captured from this target with SGLang {self.version}: {error.read_text()}")
        if response.status_code != 200:
            raise EngineFailed(
                f"SGLang answered a prefill with {response.status_code}: {response.text[:500]}; its log is {self._server.log}"
            )
        if rows[0].teachers is not None:
            (self._scratch / "states" / REDUCER).unlink(missing_ok=True)  # the scheduler has read it
        return [self._arrays(f"{name}-{n}", row.ids) for n, row in enumerate(rows)]

    def _arrays(self, rid: str, row: np.ndarray) -> list[np.ndarray]:
        try:
            ids, arrays = read_row(self._scratch / "states", rid, len(row))
        except CaptureError as error:
            raise EngineFailed(f"SGLang gave the states of a row of {len(row)} tokens in part: {error}") from None
        if not np.array_equal(ids, row):
            raise EngineFailed("SGLang prefilled other token ids than it was given: is it started with options that change prompts?")
        return arrays


def generation_options(folder: Path, dtype: str, context: int, trust_remote_code: bool, cpu: bool) -> dict[str, Any]:
    """SGLang's arguments for any use of a target; `context` is the longest row."""
    shared = {
        "model_path": str(folder),
        "dtype": dtype,
        # No row reaches the model's last positions through this: rows are at most `context` long
        "context_length": context + LONGER,
        "trust_remote_code": trust_remote_code,
        "skip_server_warmup": True,
    }
    return {**shared, **(cpu_options(8 * (context + LONGER)) | {"disable_cuda_graph": True} if cpu else {})}


def make_scratch(wanted: int) -> tuple[Path, int]:
    """A folder in shared memory (in the temporary folder where there is no room for `wanted` bytes), and its lock's descriptor.

    Folders that killed runs left are removed: nobody holds their lock.
    """
    places = [place for place in (SHARED_MEMORY, Path(tempfile.gettempdir())) if os.access(place, os.W_OK)]
    for place in places:
        for old in place.glob(f"{NAME}*"):
            _remove_stale(old)
    roomy = [place for place in places if shutil.disk_usage(place).free > wanted]
    if not roomy:
        raise UserError(
            f"no room for two batches of hidden states ({wanted / 1e9:.1f} GB) in {' or '.join(map(str, places))}: "
            "lower dump.batch_tokens, or set TMPDIR to a larger place"
        )
    folder = Path(tempfile.mkdtemp(prefix=NAME, dir=roomy[0]))
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "states").mkdir()
    (folder / "tmp").mkdir()
    return folder, lock


def _remove_stale(folder: Path) -> None:
    try:
        if time.time() - folder.stat().st_mtime < STALE_SECONDS:
            return  # perhaps just being made
        lock = os.open(folder / "lock", os.O_RDWR)
    except OSError:
        return  # of somebody else, or gone
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # in use
    finally:
        os.close(lock)
