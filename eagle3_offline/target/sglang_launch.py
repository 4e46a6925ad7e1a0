"""SGLang's server, and a supervisor that leaves nothing of it behind: `python -m eagle3_offline.target.sglang_launch ARGUMENTS`.

The only module that imports SGLang. SGLang's processes ask the kernel to die with their parents, but only once they have
imported half of torch: a kill -9 before that leaves orphans. So the first process here stays small and watches: when the process
that started it dies, or the server does, it kills whatever is left of its process group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.2


def main(arguments: list[str]) -> int:
    """Run `sglang.launch_server` with these arguments below a supervisor; the server's exit code, 128 + n for signal n."""
    starter = os.getppid()
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # only our own processes are in it
    server = os.fork()
    if server == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        serve(arguments)
        return 0
    signal.signal(signal.SIGTERM, lambda number, _frame: os.kill(server, number))
    try:
        while True:
            ended, status = os.waitpid(server, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code
            if os.getppid() != starter:
                return 1
            time.sleep(POLL_SECONDS)
    finally:
        kill_group()


def serve(arguments: list[str]) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def kill_group() -> None:
    """Kill every other process of our group."""
    group = os.getpgrp()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and os.getpgid(int(entry.name)) == group:
                os.kill(int(entry.name), signal.SIGKILL)
        except ProcessLookupError:
            pass


if __name__ == "__main__":  # SGLang spawns processes that import this module again
    sys.exit(main(sys.argv[1:]))
