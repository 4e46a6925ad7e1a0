"""Campaigns: long tests that run at a tenth of their size in `make test`, and whole in `make soak`. The code is the same."""

from __future__ import annotations

import os

SOAK = os.environ.get("EAGLE3_SOAK") == "1"


def size(full: int) -> int:
    return full if SOAK else max(1, full // 10)
