"""The store's commands on a real run: compact dumps, degrade, import of other trainers' samples, exit codes."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eagle3_offline.capture import compact
from eagle3_offline.capture import dump as capture_dump
from eagle3_offline.runs import read_jsonl
from eagle3_offline.store.numeric import to_float32
from eagle3_offline.store.reader import Dump

from ..small_runs import Cli, conversations, write_recipe


def samples_of(dump):
    """(id, ids [T], mask [T], aux [T, 3H], last [T, H]) of every row, as torch tensors; last states that no teacher needs are zero."""
    for i in range(len(dump)):
        sample = dump.sample(i)
        mask = np.zeros(len(sample.input_ids), np.int64)
        for start, end in sample.turns:
            mask[start:end] = 1
        last = np.zeros((len(mask), dump.spec.hidden_size), np.uint16)
        last[sample.last_positions] = sample.last
        states = (torch.from_numpy(x).view(torch.bfloat16) for x in (sample.aux, last))
        yield sample.id, torch.from_numpy(sample.input_ids).long(), torch.from_numpy(mask), *states


@pytest.fixture
def importing(random_target, tmp_path):
    """A command line on a new run of the same target."""
    return Cli(write_recipe(tmp_path / "importing", random_target, conversations(1)), tmp_path / "imported")


def test_specforge_samples(dumped, importing, tmp_path):
    source = Dump.open(dumped.run / "dump")
    folder = tmp_path / "samples" / "rows_0-50"
    folder.mkdir(parents=True)
    for number, (_, ids, mask, aux, last) in enumerate(samples_of(source)):
        content = {"input_ids": ids, "loss_mask": mask, "hidden_state": last[None], "aux_hidden_state": aux[None]}
        if number % 2:
            with gzip.open(folder / f"data_{number}.ckpt.gz", "wb") as handle:
                torch.save(content, handle)
        else:
            torch.save(content, folder / f"data_{number}.ckpt")
    assert "--trust-ckpt" in importing.stage("store", "import", str(folder.parent), exit_code=2)
    broken = folder / "data_0.ckpt"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])  # what others count as done
    assert "1 of" in importing.stage("store", "import", str(folder.parent), "--trust-ckpt", exit_code=3)
    done = importing.stage("store", "import", str(folder.parent), "--trust-ckpt", "--set", "max_rejected=0.5")
    assert done["rejected"] == 1 and done["done"] == len(source) - 1
    rejected = [line for file in (importing.run / "errors" / "import").glob("*.jsonl") for line in read_jsonl(file)]
    assert [line["id"] for line in rejected] == ["rows_0-50/data_0.ckpt"]
    dump = Dump.open(importing.run / "dump")
    for i in range(len(dump)):
        theirs, mine = source.sample(int(dump.ids(i).split("data_")[1].split(".")[0])), dump.sample(i)
        assert mine.input_ids.tolist() == theirs.input_ids.tolist() and mine.turns == theirs.turns
        assert mine.aux.tobytes() == theirs.aux.tobytes() and mine.last.tobytes() == theirs.last.tobytes()
    importing.stage("store", "verify")


def test_speculators_samples(dumped, importing, random_target, tmp_path):
    from datasets import Dataset

    source = Dump.open(dumped.run / "dump")
    folder = tmp_path / "hidden_states"
    folder.mkdir()
    rows = list(samples_of(source))
    for number, (_, ids, _, aux, last) in enumerate(rows):
        states = torch.cat([aux.unflatten(1, (3, -1)), last[:, None]], dim=1)  # [T, 4, H]; here the last ones are normed once more
        save_file({"hidden_states": states.contiguous(), "token_ids": ids}, folder / f"hs_{number}.safetensors")
    Dataset.from_dict({"input_ids": [r[1].tolist() for r in rows], "loss_mask": [r[2].tolist() for r in rows]}).save_to_disk(
        tmp_path / "masks"
    )
    assert "--masks" in importing.stage("store", "import", str(folder), exit_code=2)
    done = importing.stage("store", "import", str(folder), "--masks", str(tmp_path / "masks"))
    assert done["done"] == len(source) and done["rejected"] == 0
    dump = Dump.open(importing.run / "dump")
    config = json.loads((random_target / "config.json").read_text())
    weight = torch.from_numpy(dump.target_tensors()["norm.weight"].copy()).view(torch.bfloat16).float()
    number = int(dump.ids(0).removesuffix(".safetensors").rpartition("_")[2])
    before = rows[number][4].float()
    normed = (weight * before * torch.rsqrt(before.square().mean(-1, keepdim=True) + config["rms_norm_eps"])).bfloat16()
    found = torch.from_numpy(dump.sample(0).last).view(torch.bfloat16)
    torch.testing.assert_close(found, normed[torch.from_numpy(dump.sample(0).last_positions)])


COMPACT = ("--set", "dump.mode=compact", "--set", "dump.rank=0.5", "--set", "dump.top_k=8")


def test_a_compact_run(answered, dumped, monkeypatch):
    monkeypatch.setattr(compact, "TOKENS_PER_CHANNEL", 2)
    monkeypatch.setattr(capture_dump, "TOKENS_PER_CHANNEL", 2)
    assert "--fit-basis" in answered.stage("dump-hidden", *COMPACT, exit_code=2)
    fitted = answered.stage("dump-hidden", "--fit-basis", *COMPACT)
    assert fitted["rank"] == 16 and answered.stage("dump-hidden", "--fit-basis", *COMPACT)["basis"] == fitted["basis"]
    answered.stage("dump-hidden", *COMPACT)
    counts = answered.stage("store", "seal", *COMPACT)
    source, dump = Dump.open(dumped.run / "dump"), Dump.open(answered.run / "dump")
    assert counts["done"] == len(source) and dump.spec.codec == "int8" and dump.spec.compact.basis == fitted["basis"]
    assert [dump.ids(i) for i in range(len(dump))] == [source.ids(i) for i in range(len(source))]
    basis = dump.basis()
    projection = basis["components"] / basis["scale"][:, None]
    for i in range(0, len(dump), 5):
        full, reduced = source.sample(i), dump.sample(i)
        exact = to_float32(full.aux, "bfloat16") @ projection
        found = to_float32(reduced.aux, "bfloat16")
        assert np.sqrt(np.square(found - exact).mean()) < 0.02 * np.sqrt(np.square(exact).mean())
        after = np.append(full.input_ids, -1)[full.last_positions + 1]
        assert all(token in ids for token, ids in zip(after.tolist(), reduced.top.ids.tolist(), strict=True) if token >= 0)
    answered.stage("store", "verify")
    degraded = dumped.stage("store", "degrade", "--into", str(answered.run / "degraded"), *COMPACT)
    assert degraded["tokens"] == counts["tokens"]
    assert abs(degraded["stored_bytes"] - counts["stored_bytes"]) < 0.02 * counts["stored_bytes"]  # another basis, fitted on all rows


def test_status_estimate_plan_info(dumped):
    units = dumped.stage("store", "plan")
    assert units["array"] == f"0-{units['units'] - 1}" and sum(unit["rows"] for unit in units["plan"]) == units["rows"]
    status = dumped.stage("store", "status")
    assert status["missing"] == status["in_progress"] == [] and status["sealed"]
    assert dumped.stage("store", "info")["rows"] == 30
    found = dumped.stage("store", "estimate", "--rows", "1000", "--row-tokens", "100", "--rate", "1000")
    assert found["tokens"] == 100_000 and found["raw_bytes"] == 100_000 * 4 * 32 * 2 and found["hours"] == pytest.approx(100 / 3600)
    assert dumped.stage("store", "repair", "--dry-run")["dropped"] == {}


def test_token_rows_from_elsewhere(dumped, random_target, tmp_path):
    run = tmp_path / "foreign"
    shutil.copytree(dumped.run / "tokens", run / "tokens")
    cli = Cli(write_recipe(tmp_path / "recipe", random_target, conversations(1)), run)
    units = cli.stage("store", "plan")
    assert units["units"] == len(list((run / "tokens").iterdir())) and units["rows"] == 30
    cli.stage("dump-hidden")
    assert cli.stage("store", "seal")["done"] == 30
    (run / "plan.json").unlink()
    (run / "tokens" / "unit-00000.parquet").rename(run / "tokens" / "unit-00099.parquet")
    assert "without a gap" in cli.stage("store", "plan", exit_code=2)


def test_a_dump_that_the_disk_will_not_hold_is_refused(answered, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    text = answered.stage("dump-hidden", exit_code=2)
    assert "0.00 GB free" in text and "dump.force=true" in text and not (answered.run / "dump" / "parts").exists()
    answered.stage("dump-hidden", "--set", "dump.force=true")
