"""An SGLang server as a child of this process: its command line, its start, its health and its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any, Self

import httpx

from ..machine import free_port
from ..records import EngineFailed, UserError

TESTED = ((0, 5, 17), (0, 5, 22))  # capture by hooks was seen to work; later ones return other things from their layers
OWNED = ("model_path", "host", "port", "forward_hooks", "disable_radix_cache", "context_length", "dtype", "trust_remote_code")
REFUSED = {  # argument -> why a dump cannot be made with it
    "pp_size": "pipeline parallelism spreads the layers over processes",
    "pipeline_parallel_size": "pipeline parallelism spreads the layers over processes",
    "dp_size": "data parallelism spreads the rows over processes; run one array task per unit instead",
    "data_parallel_size": "data parallelism spreads the rows over processes; run one array task per unit instead",
    "enable_dp_attention": "DP attention pads and scatters the batch",
    "enable_mixed_chunk": "mixed chunks put decoding tokens between a prompt's",
    "quantization": "the captured states would be those of another model than the dumped head's",
    "speculative_algorithm": "a draft is not needed to read the target",
}
LONGER = 8  # SGLang takes rows up to its context less 7: one token to generate and a reserve
LOOPBACK = "127.0.0.1"
START_SECONDS = 1800.0  # a large model's weights take minutes


def installed_version() -> str | None:
    """SGLang's version without importing it; None where it is not installed."""
    try:
        return metadata.version("sglang") if util.find_spec("sglang") else None
    except metadata.PackageNotFoundError:
        return None


def require_tested_version() -> str:
    """SGLang's version, where capture was tested with it."""
    found = installed_version()
    low, high = (".".join(map(str, version)) for version in TESTED)
    if found is None:
        raise UserError(f"SGLang is not installed: pip install 'eagle3-offline[sglang]', or any version from {low} to {high}")
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if not TESTED[0] <= numbers <= TESTED[1]:
        raise UserError(f"SGLang is {found}; hidden states are captured with {low} to {high}: install one of these")
    return found


def check_options(options: dict[str, Any], config: dict[str, Any], capture: bool) -> None:
    """Refuse options of target.sglang that this program sets itself, and those that a capture can't be made with.

    config: the target's config.json.
    """
    plain = {key.replace("-", "_").lstrip("_"): value for key, value in options.items()}
    if own := [key for key in plain if key in OWNED]:
        raise UserError(f"target.sglang sets {', '.join(own)}, which eagle3-offline sets itself: remove it")
    if not capture:
        return
    for key, why in REFUSED.items():
        value = plain.get(key)
        if value not in (None, False) and (value is True or value != 1):  # a size of 1 is none
            raise UserError(f"target.sglang.{key} is {value!r}: {why}, so hidden states cannot be dumped with it")
    if method := config.get("quantization_config"):
        name = method.get("quant_method", "unknown")
        raise UserError(f"the target's weights are quantised ({name}): {REFUSED['quantization']}; dump with unquantised weights")


def command_line(options: dict[str, Any]) -> list[str]:
    """Options as words: True is a flag, False and None are left out, mappings and lists of them are JSON."""
    words: list[str] = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            words += [flag, json.dumps(value)]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def cpu_options(tokens: int) -> dict[str, Any]:
    """What SGLang needs on a machine without a GPU. tokens: size of its cache, which else takes most of the memory."""
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "grammar_backend": "none",
        "max_running_requests": 32,
        "sleep_on_idle": True,  # else its scheduler spins on a core
        "mem_fraction_static": 0.5,  # its own guess is made for GPUs and may be negative
        "max_total_tokens": tokens,
    }


class SglangServer:
    """A running server. Entering waits until it answers; leaving kills it and its children."""

    def __init__(
        self,
        words: list[str],
        log: Path,
        cpu: bool,
        *,
        host: str = LOOPBACK,
        port: int | None = None,
        temporary: Path | None = None,
        environment: dict[str, str] | None = None,
    ):
        """words: SGLang's arguments but host and port; port: a free one for None; temporary: where it may leave files of its own."""
        self.host, self.port = host, port or free_port()
        self.url = f"http://{LOOPBACK if host == '0.0.0.0' else host}:{self.port}"
        self.log = log
        self.words = [*words, "--host", host, "--port", str(self.port)]
        self.environment = {**os.environ, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1", **(environment or {})}
        if cpu:
            self.environment |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
            self.environment.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other made a busy machine 40 times slower
        if temporary is not None:
            self.environment["TMPDIR"] = str(temporary)
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process; `wait_until_healthy` waits for it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "eagle3_offline.target.sglang_launch", *self.words]
        with open(self.log, "ab") as log:
            log.write(f"{' '.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def wait_until_healthy(self, stop: Any = None, seconds: float = START_SECONDS) -> None:
        """stop: a StopSignal that ends the waiting."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if stop is not None:
                stop.check()
            self.check()
            try:
                if httpx.get(f"{self.url}/health", timeout=20).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise EngineFailed(f"SGLang did not answer within {seconds:.0f} s of its start; its log is {self.log}\n{self.last_lines()}")

    def check(self, seconds: float = 0.0) -> None:
        """Raise EngineFailed where the server is gone, or goes within so many seconds."""
        if self.process is not None and seconds:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        if self.process is not None and self.process.poll() is not None:
            raise EngineFailed(f"SGLang ended with exit code {self.process.returncode}; its log is {self.log}\n{self.last_lines()}")

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return "\n".join(text.splitlines()[-count:])

    def stop(self, grace: float = 0.0) -> None:
        """End the server and its children; with `grace` seconds it may first finish what it is asked."""
        if self.process is None:
            return
        if grace and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
