"""What this machine has and what is missing for the stages to run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any

REQUIRED = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "zarr",
    "numcodecs",
    "click",
    "pyarrow",
    "safetensors",
    "xxhash",
    "matplotlib",
    "accelerate",
    "gguf",
)
OPTIONAL = {"sglang": "the production engine, on a GPU: pip install 'eagle3-offline[sglang]'"}


def examine() -> dict[str, Any]:
    """Versions, devices, and lists of what is missing (`missing` stops a stage, `hints` do not)."""
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    missing = [f"{name} is not installed" for name in REQUIRED if versions[name] is None]
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        missing.append(f"Python is {platform.python_version()}; 3.11 or 3.12 is needed")
    hints = [f"{name} is not installed: {why}" for name, why in OPTIONAL.items() if versions[name] is None]
    if shutil.which("sbatch") is None:
        hints.append("no Slurm (sbatch) here: the scripts in slurm/ need a cluster")
    return {
        "ready": not missing,
        "python": platform.python_version(),
        "versions": versions,
        "devices": _devices() if versions["torch"] else [],
        "cpus": os.cpu_count(),
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "missing": missing,
        "hints": hints,
    }


def render(findings: dict[str, Any], as_json: bool) -> str:
    """The findings for people, or as one JSON line."""
    if as_json:
        return json.dumps(findings)
    lines = [f"python {findings['python']}, {findings['cpus']} CPUs, {findings['free_disk_gb']} GB free here", *findings["devices"]]
    lines += [f"{name} {version or '-'}" for name, version in findings["versions"].items()]
    lines += [f"MISSING: {text}" for text in findings["missing"]] + [f"hint: {text}" for text in findings["hints"]]
    return "\n".join([*lines, "ready: every stage can run here" if findings["ready"] else "not ready"])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    from .training.distributed import native_bfloat16

    gpus = [f"GPU {i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return gpus or [f"no GPU: CPU only, bfloat16 {'native' if native_bfloat16() else 'not native, fp32 is used for training'}"]
