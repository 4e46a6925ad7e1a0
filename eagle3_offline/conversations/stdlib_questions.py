"""Real questions made on the machine: one about every documented public function and class of Python's standard library."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..records import Conversation, Message, UserError

# Modules with side effects, windows, tests, or (distutils) one that site-packages may replace.
SKIPPED = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "test", "tkinter", "distutils", "lib2to3"}
SYSTEM_OWNERS = {"posix", "nt"}  # what `os` re-exports: known to users as `os`, so never walked themselves

FORMS = (
    "What does `{name}` do?",
    "Give a short example that uses `{name}`.",
    "Explain `{name}` to a beginner in a few sentences.",
    "When would I use `{name}` from the Python module `{module}`?",
    'The documentation of `{name}` begins: "{first_line}" What does that mean in practice?',
    "I found `{name}` in some Python code. What is it for, and what should I watch out for?",
)

# Plain modules whose sources show a tiny model what code looks like: about 1 MB together.
SOURCES = (
    "argparse", "ast", "calendar", "collections/__init__", "configparser", "csv", "dataclasses", "datetime", "difflib", "enum", "fractions",
    "functools", "heapq", "inspect", "json/encoder", "logging/__init__", "os", "pathlib", "random", "shutil", "statistics", "string",
    "tarfile", "tempfile", "textwrap", "threading", "typing", "unittest/case", "urllib/parse", "zipfile",
)  # fmt: skip

ANSWER_CHARACTERS = 200  # a short answer: at most about 60 tokens


@dataclass(frozen=True, slots=True)
class Documented:
    """A documented public object of the standard library."""

    name: str  # the public name, e.g. "textwrap.fill"
    module: str
    doc: str

    @property
    def question(self) -> str:
        """The object's one question; its form is chosen by a hash of its name, so it depends on nothing else."""
        form = FORMS[form_of(self.name)]
        return form.format(name=self.name, module=self.module, first_line=self.doc.partition("\n")[0].strip())

    @property
    def conversation(self) -> Conversation:
        return Conversation(f"stdlib:{self.name}", (Message("user", self.question),), source="stdlib", group=self.name)


def questions() -> list[Conversation]:
    """One question about each object, in the order of their names."""
    return [item.conversation for item in documented()]


def answer_pairs() -> list[tuple[str, str]]:
    """(question, short docstring) of each object, in the order of `questions()`."""
    return [(item.question, shorten(item.doc)) for item in documented()]


def documents() -> list[str]:
    """Text to train a tiny model on: every docstring, then the sources of some modules; a few MB."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / f"{name}.py" for name in SOURCES]
    return [item.doc for item in documented()] + [path.read_text(encoding="utf-8") for path in files if path.is_file()]


def form_of(name: str) -> int:
    """Number of the form of question that this name gets."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % len(FORMS)


def shorten(doc: str, characters: int = ANSWER_CHARACTERS) -> str:
    """The docstring's prose on one line, as many whole sentences as fit; a single long sentence is cut between words."""
    prose = _without_signature(doc).split(">>>")[0]
    text = " ".join(prose.split()) or " ".join(doc.split())
    if len(text) <= characters:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?= )", text[: characters + 1])]
    end = ends[-1] if ends else text[:characters].rfind(" ")
    return text[: end if end > 0 else characters]


def _without_signature(doc: str) -> str:
    """Drop a first line such as `gmtime([seconds]) -> (tm_year, ...)` where a description follows it."""
    first, _, rest = doc.partition("\n")
    return rest if re.match(r"[\w.]+\(", first) and rest.strip() else doc


# ---------------------------------------------------------------------------------------------------------------------
# The walk over the standard library, in a process of its own: importing 200 modules would mark the caller's


def documented() -> list[Documented]:
    """Every documented public function and class, sorted by name; the same on every run of the same Python."""
    root = Path(__file__).resolve().parents[2]
    script = f"import sys; sys.path.append({str(root)!r}); from {__name__} import print_walk; print_walk()"
    result = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL
    )
    if result.returncode != 0:
        raise UserError(
            f"the walk over the standard library of {sys.executable} exited with {result.returncode}, expected 0; "
            f"it said {result.stderr.strip()[-500:]!r}. Run it by hand: {sys.executable} -I -c {script!r}"
        )
    return [Documented(**value) for value in json.loads(result.stdout)]


def print_walk() -> None:
    """What the walking process does: print the objects as JSON."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = walk()
    sys.stdout.buffer.write(json.dumps([asdict(item) for item in found]).encode())


def walk() -> list[Documented]:
    """Import the public modules one by one and collect their objects, each once."""
    found: dict[str, Documented] = {}
    for module in sorted(sys.stdlib_module_names - SKIPPED - SYSTEM_OWNERS):
        if not module.startswith("_"):
            for canonical, item in _objects(module):
                found.setdefault(canonical, item)
    return sorted(found.values(), key=lambda item: item.name)


def _objects(module_name: str) -> Iterator[tuple[str, Documented]]:
    """(canonical name, object) of a module's own documented functions and classes; none where it cannot be imported here."""
    try:
        module = importlib.import_module(module_name)
    except Exception:  # a module of another platform, or without its C library
        return
    for name in _public_names(module):
        value = getattr(module, name, None)
        if _is_own(value, module_name) and (doc := _docstring(value)):
            yield f"{value.__module__}.{value.__qualname__}", Documented(f"{module_name}.{name}", module_name, doc)


def _public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return sorted(set(names))


def _is_own(value: Any, module_name: str) -> bool:
    """Whether it is a function or class that belongs to this module or to the private module behind it."""
    if not (inspect.isroutine(value) or inspect.isclass(value)):
        return False
    owner = getattr(value, "__module__", None)
    if not isinstance(owner, str) or not isinstance(getattr(value, "__qualname__", None), str):
        return False
    return owner == module_name or owner.startswith("_") or owner in SYSTEM_OWNERS


def _docstring(value: Any) -> str:
    try:
        return (inspect.getdoc(value) or "").strip()
    except Exception:  # a descriptor that has no docstring to give
        return ""
