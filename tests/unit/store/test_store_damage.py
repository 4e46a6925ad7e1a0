"""Every kind of file, damaged in every way: the reader refuses it or verify finds it, and nothing is ever made up."""

import random

import pytest

from eagle3_offline.records import UserError
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.verify import verify

NEVER_READ = (
    "loss_mask/c.",
    "token_counts/c.",
    "sumsq_h02/c.",
    "sumsq_h15/c.",
    "unit-00000/zarr.json",
)  # by Dump, which knows their size alone


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.Random(str(path.name)).randrange(len(data))] ^= 1 << random.Random(path.parent.name).randrange(8)
    path.write_bytes(bytes(data))


def read_all(dump):
    opened = Dump.open(dump)
    _ = opened.statistics, opened.target_tensors()
    for i in range(len(opened)):
        opened.sample(i)


def kinds_of_files(dump):
    """Every file outside the parts, every file of one part."""
    files = [path for path in dump.rglob("*") if path.is_file() and ("parts" not in path.parts or "unit-00000" in path.parts)]
    return sorted(path.relative_to(dump).as_posix() for path in files)


@pytest.mark.parametrize("damage", [remove, truncate, empty, flip])
def test_damage_to_any_file_is_found(dump, damage):
    assert verify(dump) == verify(dump, quick=True) == []
    names = kinds_of_files(dump)
    assert len(names) > 40
    for name in names:
        content = (dump / name).read_bytes()
        damage(dump / name)
        problems = verify(dump)
        assert problems and all(str(dump / name) in text for text in problems), name
        if damage is not flip or name.endswith(".json"):
            assert verify(dump, quick=True), name
        if damage is not flip or not any(text in name for text in NEVER_READ):
            with pytest.raises(UserError, match=name.split("/")[-1]):
                read_all(dump)
        (dump / name).write_bytes(content)


@pytest.mark.parametrize("name", ["h02", "h15", "input_ids"])
def test_verify_names_the_rows_that_a_damaged_shard_concerns(dump, name):
    """The very rows that the reader then refuses, and no others of the part."""
    for shard in sorted((dump / "parts" / "unit-00000" / name).glob("c.*")):
        data = shard.read_bytes()
        shard.write_bytes(bytes(len(data)))
        opened, refused = Dump.open(dump), []
        for i in range(len(opened)):
            try:
                opened.sample(i)
            except UserError:
                refused.append(opened.ids(i))
        (text,) = verify(dump)
        assert refused and text.endswith(f"[rows {', '.join(refused)}]")
        shard.write_bytes(data)


def test_white_space_in_the_manifest(dump):
    """JSON that means the same is damage all the same: nothing else vouches for `dump.json`."""
    manifest = dump / "dump.json"
    manifest.write_text(manifest.read_text().replace("\n", "\t", 1))
    assert "changed or damaged" in verify(dump)[0]
    with pytest.raises(UserError, match="dump.json is not written"):
        Dump.open(dump)


def test_every_single_flip_in_a_shard_is_found(dump):
    """No byte of a shard escapes: chunks, their checksums, the index and its checksum."""
    shard = next((dump / "parts" / "unit-00001" / "h02").glob("c.*"))
    data, row = shard.read_bytes(), 3
    good = Dump.open(dump).sample(row)
    for position in range(0, len(data), 3):
        shard.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(UserError, match=shard.name):
            Dump.open(dump).sample(row)
    shard.write_bytes(data)
    assert (Dump.open(dump).sample(row).aux == good.aux).all()


def test_a_shard_that_vanishes_after_opening(dump):
    opened = Dump.open(dump)
    opened.input_ids(2)
    for path in (dump / "parts" / "unit-00000" / "h02").glob("c.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"row 2 \(c\).*cannot be opened"):
        opened.sample(2)


def test_files_that_nothing_lists_are_reported(dump):
    (dump / "parts" / "unit-00000" / "h02" / "c.99.0").write_bytes(b"x")
    assert "not listed" in verify(dump)[0]


def test_verify_of_an_unsealed_dump(tmp_path):
    assert "expected a sealed dump" in verify(tmp_path)[0]
