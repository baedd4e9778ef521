"""New folders that appear whole: written beside under the process' number, synced, renamed when complete.

`TARGET.partial-PID` is what a killed process leaves; the next one that writes the same target removes it, if the process is
gone (or had our number before us, as in a container where every run has the same). After a fault nothing is left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; on leaving it becomes `target`, which must not exist. Raises OSError."""
    remove_stale(target)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_files(partial)
        os.replace(partial, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_stale(target: Path) -> None:
    """Remove the half-written forms of `target` whose process is gone."""
    for partial in target.parent.glob(f"{target.name}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(partial, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def sync_files(folder: Path) -> None:
    """Make the files directly in a folder durable, and their names. Raises OSError."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
