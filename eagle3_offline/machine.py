"""What this machine can do, and what is free on it."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 matmuls are native here; without the instruction they are slower than fp32."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def free_port() -> int:
    """A port of the loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
