"""`train --nproc N`: N ranks on this node, each the same command in a process of its own.

torchrun turns every exit code into 1, so that a requeued job could not tell "stopped, run me again" (85) from a fault; this keeps it.
Rank 0 speaks on this terminal, the others into a log each.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..machine import free_port
from ..records import RankFailed, Stopped, Summary, UserError
from ..runs import EXIT_STOPPED, EXIT_USAGE, StopSignal

POLL = 0.1  # seconds between two looks at the ranks
GRACE = 5.0  # seconds that the others have for their own last words when a rank has failed
LAST_LINES = 15
COMMAND = [sys.executable, "-P", "-c", "from eagle3_offline.stages.cli import main; main()"]
PR_SET_PDEATHSIG = 1


def refuse_nested(nproc: int, environment: Mapping[str, str]) -> None:
    """UserError where another launcher has started this process as one of its ranks."""
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}; expected 1 or more ranks")
    if nproc == 1:
        return
    if "RANK" in environment:
        raise UserError(f"--nproc {nproc}: a launcher has made this process rank {environment['RANK']} (RANK is set): leave --nproc out")
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        tasks = environment["SLURM_NTASKS"]
        raise UserError(f"--nproc {nproc}: srun has started {tasks} tasks, and these are the ranks (SLURM_NTASKS): leave --nproc out")


def launch(nproc: int, words: Sequence[str], logs: Path, stop: StopSignal) -> Summary:
    """Run `eagle3-offline WORDS --json` as `nproc` ranks to their end; rank 0's summary. Raises what the failed rank's exit code says."""
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [_start(rank, nproc, port, [*words, "--json"], _log(logs, rank)) for rank in range(nproc)]
    try:
        sent = _wait(ranks, stop)
        failed = _failed(ranks)
    finally:
        _end(ranks)
    if sent is not None and any(process.returncode in (EXIT_STOPPED, -sent) for process in ranks):
        # -sent: the rank had not begun to listen, so that no step was made without it
        raise Stopped(f"the ranks were stopped by {signal.Signals(sent).name}; run the same command again to go on")
    if failed:
        raise _failure(failed, ranks, logs)
    return json.loads(_log(logs, 0).read_text(encoding="utf-8").splitlines()[-1])


def _log(logs: Path, rank: int) -> Path:
    """Output of a rank; of rank 0 its stdout alone."""
    return logs / f"rank-{rank}.log"


def _start(rank: int, world: int, port: int, words: Sequence[str], log: Path) -> subprocess.Popen:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    with open(log, "wb") as output:
        # a process group of its own: a terminal's Ctrl-C comes to this process alone, which passes it on once
        return subprocess.Popen(
            [*COMMAND, *words], env=environment, stdout=output, stderr=output if rank else None,
            process_group=0, preexec_fn=die_with_parent,
        )  # fmt: skip


def _wait(ranks: list[subprocess.Popen], stop: StopSignal) -> int | None:
    """Wait for all, or for one that fails; pass signals on. Returns the signal that was passed on."""
    sent = None
    while (alive := [process for process in ranks if process.poll() is None]) and not _failed(ranks):
        if stop.received != sent:
            sent = stop.received
            for process in alive:
                process.send_signal(sent)
        time.sleep(POLL)
    return sent


def _failed(ranks: list[subprocess.Popen]) -> list[int]:
    """Ranks that ended neither done nor stopped, those that were killed first: the others may have failed for their lack."""
    failed = [rank for rank, process in enumerate(ranks) if process.returncode not in (None, 0, EXIT_STOPPED)]
    return sorted(failed, key=lambda rank: (ranks[rank].returncode >= 0, rank))


def _end(ranks: list[subprocess.Popen]) -> None:
    """Kill what still runs after the grace: without the failed rank the others would wait in vain."""
    deadline = time.monotonic() + GRACE
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(failed: list[int], ranks: list[subprocess.Popen], logs: Path) -> Exception:
    """What the first of the failed ranks ended with, and its last lines."""
    rank, code = failed[0], ranks[failed[0]].returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = _log(logs, rank).read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    said = f"its log is {_log(logs, rank)}" if rank else "what it said is above"
    text = "\n".join([f"rank {rank} of {len(ranks)} {how}, so the others were ended; {said}", *lines])
    return UserError(text) if code == EXIT_USAGE else RankFailed(text)
