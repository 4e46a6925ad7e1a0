"""Imports point one way: stages -> top tier -> phases -> parts -> leaves. Siblings never import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eagle3_offline"

LEAVES = {"records", "config", "runs", "progress", "machine", "logits"}
PARTS = {"conversations", "target", "store", "draft"}
MAY_IMPORT = {
    **{leaf: LEAVES for leaf in LEAVES},
    **{part: LEAVES for part in PARTS},
    "capture": LEAVES | {"conversations", "target", "store"},
    "training": LEAVES | {"store", "draft"},
    "evaluation": LEAVES | {"conversations", "store", "draft", "target"},
    "pipeline": LEAVES | PARTS | {"capture", "training", "evaluation"},
    "doctor": LEAVES | PARTS | {"capture", "training", "evaluation"},
    "stages": LEAVES | PARTS | {"capture", "training", "evaluation", "pipeline", "doctor"},
}
HEAVY = {"torch", "transformers", "deepspeed", "sglang", "datasets"}
BANNED = {**{leaf: HEAVY for leaf in LEAVES}, "store": HEAVY | {"pyarrow"}, "training": {"sglang", "datasets"}, "capture": {"deepspeed"}}


def files() -> list[tuple[str, Path]]:
    """(place, file) of every module; the package's own __init__ is no place."""
    found = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]
    found += [("stages", path) for path in (ROOT / "stages").glob("*.py")]
    return sorted((place, path) for place, path in found if place != "__init__")


def imported(place: str, path: Path) -> set[str]:
    """Places of the project and top-level packages that a file imports, wherever in it."""
    depth = len(path.relative_to(PACKAGE).parts) if PACKAGE in path.parents else 1
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level and place == "stages":
                base = f"eagle3_offline.stages.{base}".rstrip(".")
            elif node.level == depth:  # the package's root
                base = f"eagle3_offline.{base}".rstrip(".")
            elif node.level:
                base = f"eagle3_offline.{place}.{base}".rstrip(".")
            names |= {base} if base != "eagle3_offline" else {f"eagle3_offline.{alias.name}" for alias in node.names}
    return {name.split(".")[1] if name.startswith("eagle3_offline.") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("place, path", files(), ids=lambda value: str(value).removeprefix(str(ROOT)))
def test_imports_point_one_way(place, path):
    assert place in MAY_IMPORT, f"{path} is in no place of the map"
    known = set(MAY_IMPORT) | {"stages"}
    inside = imported(place, path) & known - {place}
    assert inside <= MAY_IMPORT[place], f"{place} may not import {inside - MAY_IMPORT[place]}"
    assert not imported(place, path) & BANNED.get(place, set())


def test_a_wrong_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "draft").mkdir()
    module = tmp_path / "draft" / "wrong.py"
    module.write_text("from ..store.reader import Dump\nfrom .. import training\nfrom . import model\nimport torch.nn\n")
    assert imported("draft", module) == {"store", "training", "draft", "torch"}


@pytest.mark.parametrize(
    "blocked, modules",
    [
        ("sglang vllm datasets", "training.loop evaluation.simulate"),
        ("sglang deepspeed", "capture.regenerate capture.dump"),
        (
            "torch transformers deepspeed sglang",
            "store.reader store.writer store.seal store.verify config runs records progress stages.cli",
        ),
    ],
)
def test_a_phase_works_without_the_others_packages(blocked, modules):
    code = (
        "import importlib, sys\n"
        f"blocked = {blocked.split()!r}\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder(PathFinder):  # as if they were not installed\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.split('.')[0] in blocked else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Finder\n"
        f"for name in {modules.split()!r}: importlib.import_module('eagle3_offline.' + name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
