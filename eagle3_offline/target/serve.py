"""Several SGLang servers of one target on this machine: one per GPU, or one on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..records import EngineFailed, UserError
from ..runs import StopSignal
from .sglang_server import SglangServer, command_line, installed_version

GRACE = 30.0  # seconds in which a stopped server may finish what it is asked


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def serve(
    options: dict[str, Any],
    more: tuple[str, ...],
    logs: Path,
    stop: StopSignal,
    say: Callable[[str], None],
    *,
    host: str,
    port: int,
    gpus_per_server: int,
) -> int:
    """Serve until a signal comes; how many servers there were. `options` give way to `more`, SGLang's own arguments.

    Raises EngineFailed when a server dies; the others are stopped then.
    """
    if installed_version() is None:
        raise UserError("SGLang is not installed: pip install 'eagle3-offline[sglang]'")
    words = [*command_line(without(options, more)), *more]
    servers = [
        SglangServer(words, logs / f"server-{number}.log", cpu=not gpus, host=host, port=port + number, environment=_use(gpus))
        for number, gpus in enumerate(_shares(visible_gpus(), gpus_per_server))
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_healthy(stop)
            say(f"{server.url} is up, its log is {server.log}")
        say("serving; a signal or Ctrl-C ends it")
        while stop.received is None:
            for server in servers:
                server.check()
            time.sleep(0.5)
    except EngineFailed:
        for server in servers:
            server.stop()
        raise
    finally:
        for server in servers:
            server.stop(GRACE)
    return len(servers)


def without(options: dict[str, Any], more: tuple[str, ...]) -> dict[str, Any]:
    """The options that `more` does not set itself; an attention backend of one phase replaces the one of both."""
    named = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in more if word.startswith("--")}
    if any(name.endswith("attention_backend") for name in named):
        named.add("attention_backend")
    return {key: value for key, value in options.items() if key not in named}


def _shares(gpus: list[str], size: int) -> list[list[str]]:
    """GPUs of each server; one server without any where there are none."""
    if not gpus:
        return [[]]
    if len(gpus) % size:
        raise UserError(f"{len(gpus)} GPUs cannot be shared out in groups of {size}: set CUDA_VISIBLE_DEVICES or --gpus-per-server")
    return [gpus[start : start + size] for start in range(0, len(gpus), size)]


def _use(gpus: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
