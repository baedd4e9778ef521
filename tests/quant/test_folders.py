"""A new folder is made by one process at a time, whoever's process ids are the same; a dead one's half goes.

The other process is a real one, in a namespace of its own ids where the machine allows that, as in a container.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant.folders import new_folder, remove_stale, wait_for

HOLD = """
import os, sys
from pathlib import Path
from quant.folders import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    (folder / "half").rename(folder / "whole")
"""
NAMESPACE = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child"]
can_unshare = subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
Start = Callable[[list[str]], subprocess.Popen[str]]


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "cache" / "copy"


@pytest.fixture
def start(target) -> Iterator[Start]:
    """Start a process that is making `target` until it is told to end."""
    started = []

    def call(before: list[str]) -> subprocess.Popen[str]:
        words = [*before, sys.executable, "-c", HOLD, str(target)]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None and child.stdout.readline().strip().isdecimal()
        return child

    yield call
    for child in started:
        child.kill()
        child.wait()


def halves(target: Path) -> list[Path]:
    return list(target.parent.glob("*.partial-*"))


@pytest.mark.parametrize("before", [[], NAMESPACE], ids=["one system", "a container"])
def test_the_half_of_a_live_process_stays_and_the_other_waits(target, start, before):
    if before and not can_unshare:
        pytest.skip("this user may make no namespace of process ids")
    child = start(before)
    remove_stale(target)
    assert len(halves(target)) == 1
    said: list[str] = []

    def end() -> None:
        said.append("waits")
        child.communicate("\n")

    wait_for(target, end)
    assert said == ["waits"] and (target / "whole").exists()
    with pytest.raises(FileExistsError), new_folder(target):
        raise AssertionError("made twice")
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_a_second_one_makes_it_after_a_first_that_failed(target, start):
    child = start([])
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert len(halves(target)) == 1
    with new_folder(target) as folder:
        assert halves(target) == [folder]
        (folder / "whole").write_text("")
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_what_a_killed_process_left_goes_also_where_nothing_is_made(target, start):
    child = start([])
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (target.parent / "copy2.partial-1").mkdir()
    remove_stale(target)
    assert [path.name for path in target.parent.iterdir()] == ["copy2.partial-1"]
    remove_stale(target.parent / "none" / "copy")


def test_without_locks_nothing_of_others_is_removed(target, monkeypatch):
    import errno
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    target.parent.mkdir()
    (target.parent / "copy.partial-1-ab").mkdir()
    with new_folder(target) as folder:
        (folder / "whole").write_text("")
    assert sorted(path.name for path in target.parent.iterdir()) == ["copy", "copy.partial-1-ab"]
