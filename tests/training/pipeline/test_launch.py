"""No process of a pipeline outlives the one that started it, not even one that had hardly begun."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

COORDINATOR = """
import os, signal, sys, time
from lopt_edge.training.pipeline.launch import Children
children = Children(3, port=1)
print(*(child.pid for child in children.processes.values()), flush=True)
time.sleep(float(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.3, 2.0], ids=["at once", "while it imports", "later"])
def test_workers_end_with_a_killed_coordinator(seconds):
    done = subprocess.run([sys.executable, "-c", COORDINATOR, str(seconds)], capture_output=True, text=True, check=False)
    workers = []
    for pid in map(int, done.stdout.split()):
        try:
            workers.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    assert done.returncode == -9 and len(done.stdout.split()) == 2
    _, alive = psutil.wait_procs(workers, timeout=4)  # importing torch alone takes about that long
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
