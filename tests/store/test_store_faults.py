"""Disks that are full, read-only or gone: a clear error and exit code, no half part visible, and a re-run completes."""

import shutil
import subprocess

import pytest

from eagle3_offline.store.background import BackgroundPart
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.verify import verify
from eagle3_offline.store.writer import PartWriter

from .dumps import SIZES, digest_of, make_dump, row_of, spec_of


class SmallDisk:
    """A tmpfs of its own."""

    def __init__(self, folder, kib):
        self.folder = folder
        folder.mkdir()
        self.error = self._mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs")

    def change(self, options):
        assert self._mount("-o", f"remount,{options}") == ""

    def _mount(self, *words):
        try:
            done = subprocess.run(["mount", *words, self.folder], capture_output=True, text=True)
        except FileNotFoundError as error:
            return str(error)
        return "" if done.returncode == 0 else done.stderr.strip() or "mount failed"


@pytest.fixture
def disk(answered, tmp_path, require):
    """disk(kib): a small disk that holds the dump of the run `answered`."""
    made = []

    def make(kib):
        small = SmallDisk(tmp_path / "disk", kib)
        require("mount", small.error == "", f"a small tmpfs cannot be mounted here: {small.error}")
        made.append(small)
        (answered.run / "dump").symlink_to(small.folder)
        return small

    yield make
    for small in made:
        subprocess.run(["umount", "--lazy", small.folder], check=True)  # a reader's memory maps may not be collected yet


def parts_of(run):
    return sorted(path.name for path in (run / "dump" / "parts").glob("*")) if (run / "dump" / "parts").is_dir() else []


def check_complete(cli, dumped):
    """A re-run dumps what is missing; the dump equals the one that nothing disturbed."""
    assert cli.stage("dump-hidden")["done"] == cli.stage("store", "seal")["done"] == 30
    assert verify(cli.run / "dump") == []
    ours, theirs = Dump.open(cli.run / "dump"), Dump.open(dumped.run / "dump")
    assert [digest_of(ours.sample(i)) for i in range(30)] == [digest_of(theirs.sample(i)) for i in range(30)]
    assert not list((cli.run / "dump" / "parts").glob(".*"))


SHORT = ("--set", "train.total_steps=2", "--set", "train.eval_every=2")
FORCE = ("--set", "dump.force=true")


def kib_of(folder):
    """What a folder takes on a tmpfs: whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("units", [None, 0, 1, 2])
def test_a_full_disk(answered, dumped, disk, units):
    """With room for half of the target's files, or for so many units and a half."""
    target, parts = kib_of(dumped.run / "dump" / "target"), [kib_of(part) for part in sorted((dumped.run / "dump" / "parts").iterdir())]
    small = disk(target // 2 if units is None else target + sum(parts[:units]) + parts[units] // 2)
    if units == 0:
        text = answered.stage("dump-hidden", exit_code=2)
        assert "estimated at " in text and "has 0.00 GB free" in text and "--set dump.force=true" in text
    text = answered.stage("dump-hidden", *FORCE, exit_code=1)
    assert "dump-hidden: [Errno 28] No space left on device" in text
    if units is not None:
        assert f"parts/unit-{units:05d} was not published; mend this and run the same command again" in text
    assert parts_of(answered.run) == [f"unit-{unit:05d}" for unit in range(units or 0)]
    small.change("size=64m")
    check_complete(answered, dumped)


def test_a_read_only_disk(answered, dumped, disk):
    small = disk(65536)
    assert answered.stage("dump-hidden", "--units", "0")["done"] > 0
    small.change("ro")
    text = answered.stage("dump-hidden", exit_code=1)
    assert "dump-hidden: [Errno 30] Read-only file system" in text and "unit-00001" in text
    assert parts_of(answered.run) == ["unit-00000"]
    small.change("rw")
    check_complete(answered, dumped)


def test_a_unit_folder_that_vanishes_while_it_is_written(answered, dumped, monkeypatch):
    finish = BackgroundPart.finish

    def vanish_first(self):
        done = finish(self)
        if self.part.unit == 1:
            for folder in (answered.run / "dump" / "parts").glob(".*.tmp"):
                shutil.rmtree(folder)
        return done

    monkeypatch.setattr(BackgroundPart, "finish", vanish_first)
    text = answered.stage("dump-hidden", exit_code=1)
    assert "vanished" in text and "unit-00001" in text and "run the same command again" in text
    assert parts_of(answered.run) == ["unit-00000"]
    monkeypatch.undo()
    check_complete(answered, dumped)


def test_an_array_that_vanishes_between_two_shards(tmp_path):
    """The next shard makes its folder anew; the part must not be sealed without what was in it."""
    spec = spec_of("lossless")
    with PartWriter(tmp_path, 0, "train", spec, sizes=SIZES) as part:
        part.add(row_of(spec, 0, 0))
        (folder,) = (tmp_path / "parts").glob(".*/h02")
        assert list(folder.iterdir())
        shutil.rmtree(folder)
        part.add(row_of(spec, 0, 1))
        with pytest.raises(OSError, match="vanished.*unit-00000 was not published"):
            part.seal()
    assert not list((tmp_path / "parts").iterdir())


def test_a_folder_without_part_json_is_refused_before_the_work(tmp_path):
    spec = spec_of("lossless")
    make_dump(tmp_path, "lossless", 1)
    (tmp_path / "parts" / "unit-00000" / "part.json").unlink()
    with pytest.raises(ValueError, match="without its part.json.*store repair"), PartWriter(tmp_path, 0, "train", spec):
        pass


def test_a_dump_that_vanishes_while_it_is_read(answered, dumped, monkeypatch):
    dump = answered.run / "dump"
    shutil.copytree(dumped.run / "dump", dump)
    sample, reads = Dump.sample, []

    def vanish_after_three(self, *words, **options):
        reads.append(1)
        if len(reads) == 3:
            shutil.rmtree(dump / "parts")
        return sample(self, *words, **options)

    monkeypatch.setattr(Dump, "sample", vanish_after_three)
    monkeypatch.setattr("eagle3_offline.store.reader.OPEN_SHARDS", 1)
    text = answered.stage("train", *SHORT, exit_code=2)
    assert "train: row " in text and "is missing" in text and str(dump) in text
    monkeypatch.undo()
    shutil.rmtree(dump)
    shutil.copytree(dumped.run / "dump", dump)
    answered.stage("train", *SHORT)
