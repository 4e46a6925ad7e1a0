"""What the processor can do."""

from __future__ import annotations

from pathlib import Path


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 matmuls are native here; without the instruction they are slower than fp32."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
