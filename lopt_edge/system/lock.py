"""One run per output folder: a lock that dies with its process.

`.lock` in the folder is locked by the kernel (flock), so a killed run leaves no lock, only the file, which the next run
takes over; the file names the process that holds it, for the message. It is removed at the end. Where the file system
knows no locks (some network folders) the run goes on without one and says so. What it does not do: guard against runs on
other machines where the network file system keeps locks local.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lopt_edge.errors import InputError, RunError
from lopt_edge.system.files import make_folder

LOCK_NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def output_lock(
    folder: Path, *, warn: Callable[[str], None] = lambda text: None, setting: str = "output"
) -> Iterator[None]:
    """Lock the folder, which is made if it is not there. Raises InputError if another process has locked it."""
    path = folder / LOCK_NAME
    try:
        make_folder(folder)
        descriptor = _take(path, warn, setting)
    except OSError as error:
        raise RunError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix="check the folder's permissions and the disk's free space",
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for this file sees below that it is gone
        os.close(descriptor)


def _take(path: Path, warn: Callable[[str], None], setting: str) -> int:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                warn(f"{path.parent} lies on a file system without locks: start no second run there")
                return descriptor
            holder = os.read(descriptor, 100).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise InputError(
                f"another run is writing there ({holder or 'process unknown'})",
                where=f"{setting} {path.parent}",
                fix="wait for it, or choose another folder",
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)  # its holder removed it just before we got it
