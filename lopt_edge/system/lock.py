"""One run per output folder: a lock that dies with its process.

`.lock` in the folder is locked by the kernel (quant/locks.py), so a killed run leaves no lock, only the file, which the
next run takes over; the file names the process that holds it, for the message. It is removed at the end. Where the file
system knows no locks (some network folders) the run goes on without one and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lopt_edge.errors import InputError, RunError
from lopt_edge.system.files import make_folder
from quant.locks import Held, let_go, take

LOCK_NAME = ".lock"


@contextmanager
def output_lock(
    folder: Path, *, warn: Callable[[str], None] = lambda text: None, setting: str = "output"
) -> Iterator[None]:
    """Lock the folder, which is made if it is not there. Raises InputError if another process has locked it."""
    path = folder / LOCK_NAME
    try:
        make_folder(folder)
        descriptor, is_locked = take(path)
    except Held as held:
        raise InputError(
            f"another run is writing there ({str(held) or 'process unknown'})",
            where=f"{setting} {folder}",
            fix="wait for it, or choose another folder",
        ) from None
    except OSError as error:
        raise RunError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix="check the folder's permissions and the disk's free space",
        ) from None
    if not is_locked:
        warn(f"{folder} lies on a file system without locks: start no second run there")
    try:
        yield
    finally:
        let_go(path, descriptor)
