"""What this machine can do, and what is free on it."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 matmuls are native here; without the instruction they are slower than fp32."""
    return "avx512_bf16" in _cpu_flags() or cpu_has_matrix_units()


def cpu_has_matrix_units() -> bool:
    """For bfloat16."""
    return "amx_bf16" in _cpu_flags()


@cache
def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def free_port() -> int:
    """A port of the loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
