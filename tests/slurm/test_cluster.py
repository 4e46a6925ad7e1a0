"""Each script submitted for real, to a throw-away Slurm on this machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eagle3_offline.runs import Run, read_json
from eagle3_offline.training.metrics import read_metrics

from ..small_runs import Cli, conversations, own_environment, write_recipe

ROOT = Path(__file__).parents[2]
SANDBOX = Path(__file__).with_name("sandbox.sh")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


@pytest.fixture(scope="session")
def cluster(require):
    """The environment of a running cluster of one node."""
    require("slurm", all(shutil.which(name) for name in DAEMONS) and os.geteuid() == 0, "no Slurm here, or not root")
    done = subprocess.run([SANDBOX, "up"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exports = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield {**own_environment(), **exports, "PATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([SANDBOX, "down"], env={**os.environ, **exports}, check=True)


def submit(cluster: dict, script: str, cli: Cli, *options: str, folder: Path) -> str:
    environment = {**cluster, "RECIPE": str(cli.recipe), "RUN": str(cli.run)}
    done = subprocess.run(
        ["sbatch", "--parsable", *options, f"slurm/{script}"], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait(cluster: dict, job: str, seconds: float = 180) -> set[tuple[str, str]]:
    """(state, exit code) of all tasks of a job, when all have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        shown = subprocess.run(["scontrol", "show", "job", "-o", job], env=cluster, capture_output=True, text=True).stdout
        fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown.splitlines()]
        if fields and all(f["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") for f in fields):
            return {(f["JobState"], f["ExitCode"]) for f in fields}
        time.sleep(0.3)
    raise TimeoutError(f"job {job} did not end within {seconds} s: {shown}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where a user submits from: the scripts, and a folder for the logs."""
    folder = tmp_path_factory.mktemp("submit")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    (folder / "logs").mkdir()
    return folder


def test_the_whole_run_through_slurm(cluster, folder, random_target):
    cli = Cli(write_recipe(folder, random_target, conversations(20), prepare={"eval_rows": 4}, train={"total_steps": 4}), folder / "run")
    cli.stage("prepare")
    units = len(Run(cli.run).read_plan().units)
    assert units == 3
    array = f"--array=0-{units - 1}"
    answers = submit(cluster, "regenerate.sh", cli, array, folder=folder)
    dumped = submit(cluster, "dump_hidden.sh", cli, array, f"--dependency=aftercorr:{answers}", folder=folder)
    assert wait(cluster, answers) == {("COMPLETED", "0:0")}, logs(folder)
    assert wait(cluster, dumped) == {("COMPLETED", "0:0")}, logs(folder)
    assert cli.stage("store", "seal")["done"] == 20
    training = submit(cluster, "train.sh", cli, "--ntasks=2", folder=folder)  # two ranks, by srun
    assert wait(cluster, training) == {("COMPLETED", "0:0")}, logs(folder)
    assert [line["step"] for line in read_metrics(Run(cli.run).draft("draft") / "metrics.csv")] == [1, 2, 3, 4]
    names = sorted(path.name for path in (folder / "logs").iterdir())
    assert f"train_{training}.out" in names and f"dump_hidden_{dumped}_2.out" in names
    stages = [entry["stage"] for entry in read_json(cli.run / "provenance.json")]  # racing tasks wrote it
    assert (stages.count("regenerate"), stages.count("dump-hidden"), stages.count("train")) == (3, 3, 2)


def test_one_failed_unit_is_submitted_again_alone(cluster, folder, random_target, tmp_path):
    cli = Cli(write_recipe(tmp_path, random_target, conversations(20), prepare={"eval_rows": 4}), tmp_path / "run")
    cli.stage("prepare")
    cli.stage("regenerate", "--units", "0,2")
    only_two = submit(cluster, "dump_hidden.sh", cli, "--array=0-2", folder=folder)
    assert wait(cluster, only_two) == {("COMPLETED", "0:0"), ("FAILED", "2:0")}, logs(folder)  # unit 1 has no answers yet
    assert "8 planned rows are neither done nor rejected" in cli.stage("store", "seal", exit_code=2)
    for script in ("regenerate.sh", "dump_hidden.sh"):
        assert wait(cluster, submit(cluster, script, cli, "--array=1", folder=folder)) == {("COMPLETED", "0:0")}, logs(folder)
    assert cli.stage("store", "seal")["done"] == 20


def test_exit_codes_reach_slurm(cluster, folder, random_target, tmp_path):
    cli = Cli(write_recipe(tmp_path, random_target, conversations(4)), tmp_path / "run")
    assert wait(cluster, submit(cluster, "train.sh", cli, "--ntasks=1", folder=folder)) == {("FAILED", "2:0")}, logs(folder)


def test_slurms_warning_saves_and_exits_with_85(cluster, folder, dumped, tmp_path):
    shutil.copytree(dumped.run, tmp_path / "run")
    endless = {**json.loads(dumped.recipe.read_text())}
    endless["train"]["total_steps"] = 1_000_000
    (tmp_path / "recipe.yaml").write_text(json.dumps(endless))
    cli = Cli(tmp_path / "recipe.yaml", tmp_path / "run")
    job = submit(cluster, "train.sh", cli, "--ntasks=1", folder=folder)
    draft = Run(cli.run).draft("draft")
    deadline = time.monotonic() + 90
    while not (draft / "metrics.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    subprocess.run(["scancel", "--signal=USR1", job], env=cluster, check=True)  # as --signal=USR1@300 does before the time limit
    assert wait(cluster, job) == {("FAILED", "85:0")}, logs(folder)
    assert list((draft / "checkpoints").glob("step-*"))


def logs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted((folder / "logs").iterdir()))
