"""What this machine can do, and what is free on it."""

from __future__ import annotations

import contextlib
import ctypes
import socket
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 matmuls are native here; without the instruction they are slower than fp32."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def keep_freed_memory() -> None:
    """Keep what is freed for the next allocation. glibc gives large blocks back to the system, which then clears each page again."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_MAX, 0)


def free_port() -> int:
    """A port of the loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
