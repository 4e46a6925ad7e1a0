"""Random damage to every kind of file of every kind of dump: refused by the reader or found by verify, never a wrong sample."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from eagle3_offline.records import UserError
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.verify import verify

from ..campaign import size
from .dumps import KINDS, digest_of, make_dump

DAMAGES = size(1000)


def flip(data, rng):
    """One byte becomes another one."""
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ rng.randrange(1, 256)]) + data[position + 1 :]


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def delete(_data, _rng):
    return None


def empty(_data, _rng):
    return b""


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    return {kind: make_dump(tmp_path_factory.mktemp("flips") / kind, kind) for kind in KINDS}


def content(dump):
    """What a reader gets: digests by row, and of the tables; an error's text in the place of what it refuses."""

    def attempt(read):
        try:
            return read()
        except UserError as error:
            return error

    try:
        opened = Dump.open(dump)
    except UserError as error:
        return {"open": error}
    found = {i: attempt(lambda i=i: digest_of(opened.sample(i))) for i in range(len(opened))}
    found["statistics"] = attempt(lambda: tensors(opened.statistics))
    found["target"] = attempt(lambda: tensors(opened.target_tensors()))
    if opened.spec.compact:
        found["basis"] = attempt(lambda: tensors(opened.basis()))
    return found


def tensors(values):
    return {name: np.ascontiguousarray(value).tobytes() for name, value in values.items()}


def kinds_of_files(dump):
    """Kind -> files: the same array in the other part, or another shard of it, is of the same kind."""
    kinds = {}
    for path in sorted(path for path in dump.rglob("*") if path.is_file()):
        name = re.sub(r"unit-\d+|c\.[\d.]+", lambda match: match[0][0], path.relative_to(dump).as_posix())
        kinds.setdefault(name, []).append(path)
    return kinds


def check_damage(dump, path, expected):
    """Returns whether the reader refused something."""
    problems = verify(dump)
    assert problems and all(str(path) in text for text in problems), problems
    if "parts" in path.parts and path.name != "part.json":
        assert all(re.search(r"\[rows u\d-r\d", text) for text in problems), problems
    found = content(dump)
    refused = {key: value for key, value in found.items() if isinstance(value, UserError)}
    assert {**expected, **refused} == {**expected, **found}  # whatever is not refused is right
    for key, error in refused.items():
        assert path.name in str(error) or str(path.parent) in str(error), error
        if isinstance(key, int):
            assert f"row {key} (u" in str(error), error
    return bool(refused)


@pytest.mark.campaign
def test_no_damage_goes_unnoticed(dumps):
    rng, counts = random.Random(1), Counter()
    expected = {kind: content(dump) for kind, dump in dumps.items()}
    assert all(not isinstance(value, UserError) for found in expected.values() for value in found.values())
    todo = [(kind, files) for kind, dump in dumps.items() for files in kinds_of_files(dump).values()]
    rng.shuffle(todo)
    for number in range(DAMAGES):
        kind, files = todo[number % len(todo)]
        path, damage = rng.choice(files), rng.choice([flip, flip, truncate, delete, empty])
        data = path.read_bytes()
        damaged = damage(data, rng)
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        try:
            refused = check_damage(dumps[kind], path, expected[kind])
        except AssertionError as error:
            raise AssertionError(f"{damage.__name__} of {path}: {error}") from error
        path.write_bytes(data)
        counts[damage.__name__] += 1
        counts["refused by the reader"] += refused
    assert all(verify(dump) == [] for dump in dumps.values())
    print(f"\n{DAMAGES} damages over {len(todo)} kinds of files, all found by verify, none read wrongly: {dict(counts)}")
