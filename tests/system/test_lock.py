"""One run per output folder: the lock is the kernel's, so it dies with its process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lopt_edge import finetune
from lopt_edge.errors import InputError
from lopt_edge.system.lock import LOCK_NAME, output_lock
from tools.tiny_runs import make_config, make_model

HOLD = """
import sys
from pathlib import Path
from lopt_edge.system.lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path, holder):
    with (
        pytest.raises(InputError, match=f"another run is writing there .process {holder.pid}."),
        output_lock(tmp_path / "out"),
    ):
        raise AssertionError("held twice")


def test_a_whole_run_is_refused_too(tmp_path, holder):
    model = make_model(tmp_path / "tiny")
    with pytest.raises(InputError, match="another run is writing there"):
        finetune(make_config(model, tmp_path))
    with pytest.raises(InputError, match="another run is writing there"):
        finetune(make_config(model, tmp_path, resume="auto"))


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / LOCK_NAME).exists()
    with output_lock(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK_NAME).read_text() == f"process {os.getpid()}\n"
    assert not (tmp_path / "out" / LOCK_NAME).exists()


def test_where_locks_are_unknown_the_run_goes_on_and_says_so(tmp_path, monkeypatch):
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with output_lock(tmp_path / "out", warn=said.append):
        pass
    assert "without locks" in said[0]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    from lopt_edge.errors import RunError

    with pytest.raises(RunError, match="cannot be written"), output_lock(Path(tmp_path / "file" / "out")):
        pass
