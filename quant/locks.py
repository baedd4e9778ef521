"""Lock files that die with their process. Imports no torch.

The rule: who owns a file or folder is said by a lock of the kernel (flock), never by a process id: in containers that share
a volume several processes have the same id, and none can see the others'. A killed process leaves the lock file, not the
lock. The file names its holder's process, for messages alone. Where the file system knows no locks (some network folders)
that is the answer, and the caller decides what it may do without one.

Not here: locks between machines where the network file system keeps them local.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Held(Exception):
    """The refusal of a lock that another process has; its text is what that process wrote into the file."""


def take(path: Path, *, wait: bool = False) -> tuple[int, bool]:
    """The descriptor of the lock file, and whether it is locked (False: this file system knows no locks).

    Raises Held, unless it is to `wait`, and OSError.
    """
    while True:
        descriptor = _open(path)
        try:
            if not lock(descriptor, wait=wait):
                return descriptor, False
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    with suppress(OSError):  # of another user, who let us read it
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()}\n".encode())
                    return descriptor, True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it just before we got it


def let_go(path: Path, descriptor: int) -> None:
    """Remove the lock file, and unlock it."""
    with suppress(OSError):
        path.unlink()  # while it is held: whoever waits for this file sees that it is gone
    os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file, until it is closed; False where the file system knows no locks. Raises Held, OSError."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise Held(os.pread(descriptor, 100, 0).decode(errors="replace").strip()) from None
    return True


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
