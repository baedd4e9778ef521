"""The processes of a run, a pipeline's or ranks that share a step: started by us on this machine, or by torchrun.

Process 0 is the one that the user started; it starts the others (`FOLLOW`) and tells them where to meet by variables of the
environment. The rules: no process outlives process 0 (the kernel kills it then; where the kernel does not know that, it
looks for its parent once a second; and this is arranged before torch is imported, which takes seconds); process 0 never
waits for a dead one (`check`). Ctrl-C reaches the whole group of processes: the others ignore it, process 0 decides what
becomes of it.

What torchrun started it watches itself; there only process 0 runs the program, the others follow. No torch here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

from lopt_edge.errors import PeerLost

RANK, PORT, PARENT = "LOPT_PIPELINE_RANK", "LOPT_PIPELINE_PORT", "LOPT_PIPELINE_PARENT"
SET_PARENT_DEATH_SIGNAL = 1  # of prctl, linux/prctl.h
PATIENCE_SECONDS = 10.0  # for a process to end by itself


BEGIN = "from lopt_edge.training.pipeline.launch import end_with_parent; end_with_parent(); "
FOLLOW = f"{BEGIN}from lopt_edge.training.pipeline.worker import main; main()"


def torchrun_rank() -> tuple[int, int] | None:
    """(rank, number of processes) as torchrun gives them; None where it did not start this process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Children:
    """Processes 1 .. n - 1 of a run on this machine, started with the code `follow` when this is made."""

    def __init__(self, n: int, *, port: int, follow: str = FOLLOW) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        own = {PORT: str(port), PARENT: str(os.getpid())}
        try:
            for rank in range(1, n):
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, "-c", follow],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **own, RANK: str(rank)},
                )
        except BaseException:
            self.end(at_once=True)
            raise

    def check(self) -> None:
        """Raise PeerLost if one of the processes has ended."""
        for rank, code in self.exit_codes().items():
            raise PeerLost(f"process {rank} of the run {ended(code)}")

    def exit_codes(self) -> dict[int, int]:
        """The exit codes by rank of the processes that have ended; a negative one is a signal's number."""
        found = {rank: process.poll() for rank, process in self.processes.items()}
        return {rank: code for rank, code in found.items() if code is not None}

    def end(self, *, at_once: bool) -> None:
        """Wait for the processes to end (`at_once`: do not wait), and kill those that have not."""
        deadline = time.monotonic() + (0 if at_once else PATIENCE_SECONDS)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def ended(code: int) -> str:
    """The end of a process in words, from its exit code."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def end_with_parent() -> None:
    """Let this process end when the one that started it does, or has already, whatever it is waiting for."""
    parent = int(os.environ[PARENT])
    with suppress(OSError, AttributeError):  # no prctl on macOS
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl was called
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


SETUP = "setup"  # key of the meeting place
