"""Dumps in object storage, against a real S3 server: equal to local ones, sealed once, loud where something is wrong."""

import multiprocessing
import threading

import pytest

from eagle3_offline.records import UserError
from eagle3_offline.store.part import read_part_json
from eagle3_offline.store.places import ObjectPlace, place
from eagle3_offline.store.reader import Dump
from eagle3_offline.store.seal import sealed
from eagle3_offline.store.verify import part_problems, verify
from eagle3_offline.store.writer import PartExists, PartWriter

from ..s3_server import S3Server, environment, free_ports, new_prefix
from .dumps import KINDS, SIZES, digest_of, make_dump, row_of, spec_of, write_unit


@pytest.fixture
def remote(s3, tmp_path):
    """A sealed dump in object storage."""
    return place(make_dump(s3, "lossless", scratch=tmp_path / "sending"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_dump_equals_the_local_one(s3, tmp_path, kind):
    local = Dump.open(make_dump(tmp_path / "local", kind))
    there = Dump.open(make_dump(s3, kind, scratch=tmp_path / "sending", threads=2))
    assert len(there) == len(local) == 10 and not list((tmp_path / "sending").iterdir())
    assert [digest_of(there.sample(i)) for i in range(10)] == [digest_of(local.sample(i)) for i in range(10)]
    assert digest_of(there.sample(3, window=(2, 9))) == digest_of(local.sample(3, window=(2, 9)))
    for ours, theirs in [(there.target_tensors(), local.target_tensors()), (there.statistics, local.statistics)]:
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert there.target_dtypes() == local.target_dtypes() and there.target_json("config.json") == {"a": 1}
    assert verify(s3) == verify(s3, quick=True) == []
    assert there.manifest["rows_digest"] == local.manifest["rows_digest"]


def delete(where):
    where.remove()


def truncate(where):
    where.write(where.read()[:-2])


def flip(where):
    data = bytearray(where.read())
    data[len(data) // 2] ^= 0x10
    where.write(bytes(data))


@pytest.mark.parametrize("damage", [delete, truncate, flip])
def test_damaged_objects_are_found(remote, damage):
    part = remote / "parts" / "unit-00001"
    data = remote / "parts" / read_part_json(part)["data"]
    for where in (data / "h02" / "c.1.0", data / "h15" / "zarr.json", part / "part.json", remote / "target" / "target.safetensors"):
        content = where.read()
        damage(where)
        assert any(str(where) in text for text in verify(remote))
        if damage is not flip or where.name.endswith(".json"):
            assert any(str(where) in text for text in verify(remote, quick=True))
        with pytest.raises(UserError, match=where.name):
            read_all(remote)
        where.write(content)
    assert verify(remote) == []
    read_all(remote)


def read_all(where):
    dump = Dump.open(where)
    dump.target_tensors()
    for i in range(len(dump)):
        dump.sample(i)


def test_of_two_racing_writers_one_wins(s3, tmp_path):
    """Both are about to send the same unit, with different rows; once for each unit."""
    spec = spec_of("lossless")
    for unit in range(4):
        ready, results = threading.Barrier(2), {}

        def write(name, unit=unit, ready=ready, results=results):
            with PartWriter(s3, unit, "train", spec, sizes=SIZES, scratch=tmp_path / name) as part:
                part.add(row_of(spec, unit, int(name)))
                ready.wait(60)
                try:
                    results[name] = part.seal()
                except PartExists as error:
                    results[name] = error

        threads = [threading.Thread(target=write, args=(name,)) for name in "01"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (loser,) = [name for name in results if isinstance(results[name], PartExists)]
        winner = results["1" if loser == "0" else "0"]
        parts = place(s3) / "parts"
        assert read_part_json(parts / f"unit-{unit:05d}") == winner and part_problems(parts / f"unit-{unit:05d}") == []
        found = {name.partition("/")[0] for name in parts.sizes() if name.startswith(f"unit-{unit:05d}")}
        assert found == {f"unit-{unit:05d}", winner["data"]}
        assert not list((tmp_path / "0").iterdir()) and not list((tmp_path / "1").iterdir())


def test_a_sealed_unit_is_skipped(s3, tmp_path):
    spec = spec_of("lossless")
    assert not sealed(s3, 0)
    write_unit(s3, spec, 0, scratch=tmp_path)
    assert sealed(s3, 0)
    with pytest.raises(PartExists, match="unit-00000 exists already"):
        write_unit(s3, spec, 0, scratch=tmp_path)


def test_an_answer_that_was_lost_does_not_lose_the_part(s3, tmp_path, monkeypatch):
    """The client repeats a request whose answer it did not get, and is then told that its own part.json exists."""
    create = ObjectPlace.create

    def twice(self, data):
        create(self, data)
        create(self, data)

    monkeypatch.setattr(ObjectPlace, "create", twice)
    write_unit(s3, spec_of("lossless"), 0, scratch=tmp_path)
    assert part_problems(place(s3) / "parts" / "unit-00000") == []


def send_error(dump, sender):
    try:
        dump.sample(4)
    except UserError as error:
        sender.send(str(error))


def test_spawned_workers_read_and_forked_ones_say_what_to_do(remote):
    dump = Dump.open(remote)
    expected = digest_of(dump.sample(4))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert digest_of(pool.apply_async(Dump.sample, (dump, 4)).get(timeout=60)) == expected
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=send_error, args=(dump, sender))
    child.start()
    assert receiver.poll(60) and "start workers with `spawn`" in receiver.recv()
    child.join()


def test_a_server_that_dies(s3_server, connect, tmp_path):
    spec = spec_of("lossless")
    with S3Server() as server:
        connect(server.environment)
        where = new_prefix()
        make_dump(where, "lossless", scratch=tmp_path / "sending")
        dump = Dump.open(where)
        with PartWriter(where, 7, "train", spec, sizes=SIZES, scratch=tmp_path / "sending") as part:
            part.add(row_of(spec, 7, 0))
            server.kill()
            with pytest.raises(OSError, match="cannot be reached.*unit-00007"):
                part.seal()
    assert not list((tmp_path / "sending").iterdir())
    with pytest.raises(OSError, match=r"row 0 \(u0-r0\).*cannot be reached.*part.json"):
        dump.sample(0)
    assert "cannot be reached" in verify(where)[0]


def test_stages_name_a_server_that_does_not_answer(dumped, connect):
    connect(environment(free_ports(1)[0]))
    location = ("--set", f"dump.location={new_prefix()}")
    for words in (["dump-hidden"], ["store", "verify"], ["train"]):
        text = dumped.stage(*words, *location, exit_code=2 if words[-1] == "verify" else 1)
        assert "cannot be reached" in text and "AWS_ENDPOINT" in text and "Traceback" not in text


def test_wrong_credentials_are_named(s3, s3_server, connect):
    connect({**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(OSError, match="AWS_"):
        place(s3).sizes()


def test_a_whole_run_with_its_dump_in_object_storage(s3, s3_server, dumped, answered):
    location = ("--set", f"dump.location={s3}")
    assert answered.stage("dump-hidden", *location)["done"] == answered.stage("store", "seal", *location)["done"] == 30
    assert answered.stage("dump-hidden", *location)["done"] == 30  # all skipped
    assert answered.stage("store", "verify", *location)["problems"] == 0
    local, there = Dump.open(dumped.run / "dump"), Dump.open(s3)
    assert [there.ids(i) for i in range(30)] == [local.ids(i) for i in range(30)]
    assert [digest_of(there.sample(i)) for i in range(30)] == [digest_of(local.sample(i)) for i in range(30)]
    answered.stage("train", *location, "--set", "train.total_steps=1", "--set", "train.eval_every=1")
    assert not (answered.run / "dump").exists() and not list((answered.run / "sending").iterdir())
    secrets = [s3_server.environment[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    for path in answered.run.rglob("*"):
        assert not path.is_file() or not any(secret in path.read_bytes() for secret in secrets), path
