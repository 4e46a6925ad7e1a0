"""SIGKILLs at random moments over racing writers: every sealed part is byte-exact, nothing is lost or there twice."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eagle3_offline.store.files import file_record
from eagle3_offline.store.places import LocalPlace
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.seal import missing_units
from eagle3_offline.store.verify import verify

from ..campaign import size
from .dumps import digest_of, make_dump, planned, put_target, seal_units, spec_of

ROOT = Path(__file__).parents[2]
KILLS = size(100)
UNITS = 4
WRITERS = 3  # each goes over all units, so that every unit has several at once
KILLS_A_DUMP = 5
LONGEST_WAIT = 0.5  # seconds from a writer's start to its kill, as long as it takes to write a dump
KINDS = ("lossless", "int8")


class Writers:
    """Racing writer processes of one dump."""

    def __init__(self, dump: Path, kind: str, rng: random.Random):
        self.dump, self.kind, self.rng = dump, kind, rng
        self.running: list[subprocess.Popen] = []
        self.lost = 0  # writers that were beaten at a unit

    def start(self) -> subprocess.Popen:
        units = self.rng.sample(range(UNITS), UNITS)
        command = [sys.executable, "-m", "tests.store.write_units", str(self.dump), self.kind, *map(str, units)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.running.append(process)
        return process

    def kill_one(self) -> bool:
        """Kill a writer at a random moment after its start; False where it was done before."""
        process = self.rng.choice(self.running)
        assert process.stdout.readline() == "ready\n"
        time.sleep(self.rng.uniform(0, LONGEST_WAIT))
        process.send_signal(signal.SIGKILL)
        self.running.remove(process)
        process.communicate()
        return process.returncode == -signal.SIGKILL

    def finish(self) -> None:
        """The others end by themselves, whatever happened around them."""
        while self.running:
            process = self.running.pop()
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            self.lost += output.count("lost")

    def stop(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


def records(dump):
    """Path below `parts` -> size and digest of every file of what has its final name."""
    files = [path for part in (dump / "parts").glob("unit-*") for path in part.rglob("*") if path.is_file()]
    return {path.relative_to(dump / "parts").as_posix(): file_record(LocalPlace(path)) for path in files}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Of each kind a dump that nothing disturbed: the records of its files, and its manifest's digest."""
    found = {}
    for kind in KINDS:
        dump = make_dump(tmp_path_factory.mktemp("undisturbed") / kind, kind, UNITS)
        found[kind] = records(dump), Dump.open(dump).manifest["digest"], [digest_of(s) for s in samples(dump)]
    return found


def samples(dump):
    opened = Dump.open(dump)
    return [opened.sample(i) for i in range(len(opened))]


def check_what_is_sealed(dump, files):
    """At any moment: what has its final name is whole and byte-exact."""
    there = records(dump)
    assert {name: files[name] for name in there} == there
    units = {name.split("/")[0] for name in there}
    assert {name for name in files if name.split("/")[0] in units} == set(there)


@pytest.mark.campaign
def test_kills_of_racing_writers(expected, tmp_path):
    rng, kills, lost, stale, dumps = random.Random(0), 0, 0, 0, 0
    while kills < KILLS:
        kind = KINDS[dumps % len(KINDS)]
        files, digest, contents = expected[kind]
        dump, spec = tmp_path / f"dump{dumps}", spec_of(kind)
        put_target(dump, spec)
        writers = Writers(dump, kind, rng)
        try:
            for _ in range(WRITERS - 1):
                writers.start()
            for _ in range(KILLS_A_DUMP):
                writers.start()  # in the place of the one that was killed
                kills += writers.kill_one()
                check_what_is_sealed(dump, files)
            writers.finish()
        finally:
            writers.stop()
        stale += len(list((dump / "parts").glob(".*")))
        units = [(unit, "train", planned(unit)) for unit in range(UNITS)]
        assert missing_units(dump, units) == []  # the survivors, which came after the killed ones, did what was left
        seal_units(dump, spec, UNITS)
        assert verify(dump) == [] and records(dump) == files
        assert Dump.open(dump).manifest["digest"] == digest and [digest_of(s) for s in samples(dump)] == contents
        lost, dumps = lost + writers.lost, dumps + 1
        shutil.rmtree(dump)
    print(f"\n{kills} SIGKILLs, {dumps} dumps of {UNITS} units, {stale} unfinished parts left behind, {lost} races lost, all parts exact")
    assert stale > 0  # else nothing was killed while it wrote


def test_an_unfinished_part_counts_for_nothing(tmp_path):
    """Even one that is whole but for its rename."""
    dump, spec = tmp_path / "dump", spec_of("lossless")
    make_dump(dump, "lossless", 1)
    os.rename(dump / "parts" / "unit-00000", dump / "parts" / ".unit-00000.host.1.tmp")
    assert missing_units(dump, [(0, "train", planned(0))]) == [0]
    with pytest.raises(ValueError, match="neither done nor rejected"):
        seal_units(dump, spec, 1)
