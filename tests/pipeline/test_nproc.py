"""`train --nproc`: ranks that the command starts itself, over gloo; signals, deaths and exit codes."""

import json
import os
import signal
import subprocess
import time

import pytest

from eagle3_offline.records import UserError
from eagle3_offline.runs import EXIT_FAULT, EXIT_STOPPED, EXIT_USAGE, Run
from eagle3_offline.training.launch import refuse_nested

from ..small_runs import Cli, losses
from .test_phase_two import wait_for_step


def ranks_of(parent: int) -> list[int]:
    """Process ids of a parent's children."""
    with open(f"/proc/{parent}/task/{parent}/children") as handle:
        return [int(word) for word in handle.read().split()]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def begun(cli: Cli, *more: str) -> tuple[subprocess.Popen, list[int]]:
    """A training on two ranks behind its first step: the parent and its ranks, in their order."""
    process = cli.start("train", more=("--nproc", "2", "--json", *more))
    wait_for_step(cli, 1)
    return process, ranks_of(process.pid)


def test_two_ranks_stop_together_go_on_and_give_the_losses_of_one(trained, copied):
    process, ranks = begun(copied)
    assert len(ranks) == 2
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    stopped = len(losses(copied))
    names = sorted(path.name for path in (Run(copied.run).draft("draft") / "checkpoints").glob("step-*"))
    assert names[-1] == f"step-{stopped:08d}"
    assert f"stopped at step {stopped} of 12" in (copied.run / "logs" / "train-draft" / "rank-1.log").read_text()
    assert not any(map(alive, ranks))
    process = copied.start("train", more=("--nproc", "2", "--json"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert json.loads(output.splitlines()[-1])["steps"] == 12
    assert losses(copied) == pytest.approx(losses(trained), rel=1e-5)


def test_a_dead_rank_ends_the_others_and_a_dead_parent_leaves_none(copied):
    process, ranks = begun(copied, "--set", "train.total_steps=10000")
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_FAULT, output
    assert "rank 1 of 2 was killed by SIGKILL, so the others were ended; its log is" in output
    assert not any(map(alive, ranks))
    process = copied.start("train", more=("--nproc", "2", "--set", "train.total_steps=10000"))
    deadline = time.monotonic() + 60
    while len(ranks := ranks_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(ranks) == 2 and not any(map(alive, ranks))


def test_what_a_rank_refuses_is_said_with_its_exit_code(copied):
    process = copied.start("train", more=("--nproc", "2", "--set", "train.micro_batch_size=4"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_USAGE
    assert "train.batch_size 4 is no multiple of 2 ranks x micro_batch_size 4" in output


def test_ranks_inside_of_ranks_are_refused():
    refuse_nested(1, {"RANK": "0"})
    refuse_nested(8, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"})
    with pytest.raises(UserError, match="RANK is set"):
        refuse_nested(2, {"RANK": "3"})
    with pytest.raises(UserError, match="srun has started 4 tasks"):
        refuse_nested(2, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"})
