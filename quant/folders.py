"""New folders that appear whole: written beside, synced, renamed when complete.

The rule: whoever makes `TARGET` holds the lock of `TARGET.lock` (locks.py) for as long, so two processes never make the
same folder at once, also in containers that share a volume and see neither each other's processes nor ids. Thus whatever
lies at `TARGET.partial-*` when the lock is had belongs to a dead process, and goes. After a fault nothing is left.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quant.locks import Held, let_go, take


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; on leaving it becomes `target`, which must not exist. Raises OSError.

    It waits for another process that is making it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, is_locked = take(_lock_of(target), wait=True)
    # the number is the process' own, for whoever looks; what follows tells it from its namesakes elsewhere
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        if is_locked:
            _remove_partials(target)
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        partial.mkdir()
        yield partial
        sync_files(partial)
        os.replace(partial, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        let_go(_lock_of(target), descriptor)


def wait_for(target: Path, on_wait: Callable[[], None]) -> None:
    """Return when no process is making `target`; `on_wait` is called first where one is. Raises OSError."""
    if not _lock_of(target).exists():
        return
    with suppress(FileNotFoundError, PermissionError):  # gone meanwhile; not ours to write
        try:
            descriptor, _ = take(_lock_of(target))
        except Held:
            on_wait()
            descriptor, _ = take(_lock_of(target), wait=True)
        let_go(_lock_of(target), descriptor)


def remove_stale(target: Path) -> None:
    """Remove the half-written forms of `target` whose process is gone, and its lock file."""
    with suppress(Held, OSError):  # at work; not ours to write, or not there
        if not (_lock_of(target).exists() or any(_partials(target))):
            return
        descriptor, is_locked = take(_lock_of(target))
        if is_locked:
            _remove_partials(target)
        let_go(_lock_of(target), descriptor)


def _lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _partials(target: Path) -> Iterator[Path]:
    return (path for path in target.parent.iterdir() if path.name.startswith(f"{target.name}.partial-"))


def _remove_partials(target: Path) -> None:
    for partial in _partials(target):
        shutil.rmtree(partial, ignore_errors=True)


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
