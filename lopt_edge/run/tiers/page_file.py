"""The disk tier's file, in which paged tensors lie. The folder that it lies in is page_folder.py's.

A `PageFile` is one file for all paged tensors of a process, its space reserved ahead, so that a full disk shows at the
start and not at hour five. (File systems that write every block anew, btrfs and zfs, may still run out in a write.) Its
rules:
- the name goes as soon as the space is reserved; the open descriptor keeps the file. So a crash or SIGKILL leaves
  nothing behind, and `df` sees the space until the process ends but `ls` no file
- space is handed out first-fit, in grains of 4096 bytes, and freed neighbours join. When no gap fits, the file grows by
  what is missing, up to `max_bytes`; it never shrinks before it is closed
- reads and writes are positioned, so threads need no lock between them; a lock guards the list of extents, and `close`
  waits for the transfers under way (a descriptor number that is closed under a transfer may already be another file's)
- a transfer outside one live extent is a defect of ours (ValueError), since it would overwrite another tensor: training
  goes on with garbage while the loss still falls. What the disk does wrong is a RunError with path, bytes and advice
It keeps no checksums, and it does not bypass the page cache: cached pages are the kernel's to drop, not part of the
resident set, but a control group counts them.

Only the moment between creation and unlinking can leave a named file, `lopt-pages-<pid>-<name>.bin`, which the next
`prepare_page_dir` removes. Whether its process lives is said by the lock on it (quant/locks.py): in containers that share a
volume processes have the same ids. For the same reason a name may be taken, and then a number comes into it.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

from lopt_edge.errors import RunError
from lopt_edge.plan.costs.sizes import DISK_GRAIN
from lopt_edge.units import format_bytes
from quant.locks import Held, lock

GRAIN = DISK_GRAIN
MOST_NAMESAKES = 100
MOST_AT_ONCE = 1 << 30  # bytes of one system call: Linux stops at 2 GiB, macOS refuses more than that
_PAGE_FILE = re.compile(r"lopt-pages-([1-9][0-9]{0,8})-.*\.bin", re.DOTALL)
_WHERE = "page_dir"
_OTHER_FOLDER = "choose a page folder on a disk with more room"
_ADVICE = {
    errno.EEXIST: "remove the page files there: a live run's have no name",
    errno.ENOSPC: f"free some space there, or {_OTHER_FOLDER}",
    errno.EDQUOT: f"your disk quota is used up: free some space, or {_OTHER_FOLDER}",
    errno.EFBIG: "a file may not be that large there (FAT, or ulimit -f): choose another page folder",
    errno.EIO: "the disk reports a fault: look at the system log (dmesg) and choose a page folder on another disk",
}


def _exactly(n_bytes: int) -> str:
    return format_bytes(n_bytes) if n_bytes < 2**20 else f"{format_bytes(n_bytes)} ({n_bytes:,} bytes)"


# --- the file ---------------------------------------------------------------------------------------------------------


class Extents:
    """The ranges of a space that are taken and that are free: first-fit, freed neighbours join. No I/O, no lock.

    Both lists have (start, size), sorted; together they cover [0, size) without overlap.
    """

    def __init__(self) -> None:
        self.size = self.used = self.peak = 0
        self._free: list[tuple[int, int]] = []
        self._taken: list[tuple[int, int]] = []

    @property
    def free_extents(self) -> tuple[tuple[int, int], ...]:
        """The free ranges as (start, size), sorted."""
        return tuple(self._free)

    @property
    def tail(self) -> int:
        """The free bytes at the very end, which growing need not add."""
        return self._free[-1][1] if self._free and sum(self._free[-1]) == self.size else 0

    def grow(self, n_bytes: int) -> None:
        """Add `n_bytes` free bytes at the end."""
        self._give(self.size, n_bytes)
        self.size += n_bytes

    def allocate(self, n_bytes: int) -> int | None:
        """Take `n_bytes` of the first gap that has them; returns their start, None where no gap has."""
        at = next((at for at, (_, size) in enumerate(self._free) if size >= n_bytes), None)
        if at is None:
            return None
        start, size = self._free[at]
        self._free[at : at + 1] = [(start + n_bytes, size - n_bytes)] if size > n_bytes else []
        self._taken.insert(bisect(self._taken, (start, n_bytes)), (start, n_bytes))
        self.used += n_bytes
        self.peak = max(self.peak, self.used)
        return start

    def free(self, start: int) -> None:
        """Free the range that begins at `start`. Raises ValueError if none does."""
        at = self._at(start)
        if at is None or self._taken[at][0] != start:
            raise ValueError(f"nothing is allocated at {start}")
        _, size = self._taken.pop(at)
        self.used -= size
        self._give(start, size)

    def holds(self, start: int, n_bytes: int) -> bool:
        """Whether [start, start + n_bytes) lies inside one taken extent."""
        at = self._at(start)
        return at is not None and start + n_bytes <= sum(self._taken[at])

    def _at(self, position: int) -> int | None:
        """The index of the last taken extent that starts at or before `position`."""
        at = bisect(self._taken, position, key=lambda extent: extent[0]) - 1
        return at if at >= 0 else None

    def _give(self, start: int, size: int) -> None:
        at = bisect(self._free, (start, size))
        if at < len(self._free) and start + size == self._free[at][0]:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            start, before = self._free.pop(at)
            size += before
        self._free.insert(at, (start, size))


class PageFile:
    """A file for paged tensors, nameless once made. `n_bytes` are reserved now; it grows to `max_bytes` (None: no bound).

    Sizes are rounded up to GRAIN. Several threads may use it. Raises RunError for what the disk refuses.
    """

    def __init__(self, directory: Path, *, n_bytes: int, name: str, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._extents = Extents()
        self._lock = threading.Condition()  # guards the extents, the count of transfers and the end
        self._transfers = 0
        self._closed = False
        self.path = directory / f"lopt-pages-{os.getpid()}-{name}.bin"
        try:
            self._file = self._made(directory, name)
        except OSError as error:
            raise self._failure("cannot be made", 0, error) from None
        try:
            self._grow(_round_up(n_bytes))
        except BaseException:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise
        if os.name == "posix":
            self.path.unlink(missing_ok=True)

    def _made(self, directory: Path, name: str) -> FileIO:
        """A new file, locked, under the first name that is free. Raises OSError."""
        for number in range(MOST_NAMESAKES):
            file = None
            with suppress(
                FileExistsError, Held
            ):  # a namesake has it; whoever removes what is stale was quicker than the lock
                file = FileIO(self.path, "x+", opener=lambda path, flags: os.open(path, flags, 0o600))
                lock(file.fileno())
                if os.path.exists(self.path):
                    return file
            if file is not None:
                file.close()
            self.path = directory / f"lopt-pages-{os.getpid()}-{number + 1}-{name}.bin"
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    @property
    def used_bytes(self) -> int:
        """The bytes that are allocated now."""
        with self._lock:
            return self._extents.used

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were allocated at a time."""
        with self._lock:
            return self._extents.peak

    @property
    def size_bytes(self) -> int:
        """The bytes that the file takes of the disk."""
        with self._lock:
            return self._extents.size

    def allocate(self, n_bytes: int) -> int:
        """Allocate `n_bytes`, and return their offset. The file grows if it must; raises RunError where it cannot."""
        if n_bytes < 1:
            raise ValueError(f"cannot allocate {n_bytes} bytes")
        size = _round_up(n_bytes)
        with self._lock:
            self._check_open()
            offset = self._extents.allocate(size)
            if offset is None:
                self._grow(size - self._extents.tail)
                offset = self._extents.allocate(size)
            assert offset is not None
            return offset

    def free(self, offset: int) -> None:
        """Give an allocation back; a closed file ignores it. It takes the lock, so no finaliser may call it."""
        with self._lock:
            if not self._closed:
                self._extents.free(offset)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` (contiguous) to `offset`, inside one allocation. Raises RunError if the disk fails."""
        with self._transfer(offset, data.nbytes):
            done, data = 0, _as_bytes(data)
            while done < len(data):
                try:
                    done += os.pwrite(self._file.fileno(), data[done : done + MOST_AT_ONCE], offset + done)
                except OSError as error:
                    raise self._failure(f"cannot write at {offset + done}", len(data) - done, error) from None

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` (contiguous, writable) from `offset`, inside one allocation. Raises RunError if the disk fails."""
        with self._transfer(offset, out.nbytes):
            done, out = 0, _as_bytes(out)
            while done < len(out):
                try:
                    n_read = os.preadv(self._file.fileno(), [out[done : done + MOST_AT_ONCE]], offset + done)
                except OSError as error:
                    raise self._failure(f"cannot read at {offset + done}", len(out) - done, error) from None
                if n_read == 0:
                    what = f"the page file was truncated: {len(out) - done:,} bytes are missing at {offset + done}"
                    raise RunError(
                        what, where=str(self.path), fix="start again from the last checkpoint; keep others off that disk"
                    )
                done += n_read

    def close(self) -> None:
        """Give the space back, once the transfers under way are done. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.wait_for(lambda: not self._transfers)
            self._file.close()
            if os.name != "posix":
                self.path.unlink(missing_ok=True)

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _transfer(self, offset: int, n_bytes: int) -> Iterator[None]:
        """A context in which the file stays open; the range belongs to one allocation at its start."""
        with self._lock:
            self._check_open()
            if not self._extents.holds(offset, n_bytes):
                raise ValueError(f"{n_bytes} bytes at {offset} lie outside what is allocated")
            # A file that was cut grows again with the next write, and the hole reads as zeros: look before each transfer.
            missing = self.size_bytes - os.fstat(self._file.fileno()).st_size
            if missing > 0:
                raise RunError(
                    f"the page file was truncated: {missing:,} bytes are missing",
                    where=str(self.path),
                    fix="start again from the last checkpoint; keep others off that disk",
                )
            self._transfers += 1
        try:
            yield
        finally:
            with self._lock:
                self._transfers -= 1
                self._lock.notify_all()

    def _grow(self, n_bytes: int) -> None:
        """Reserve `n_bytes` more at the end, all of them or none."""
        size = self._extents.size
        if n_bytes == 0:
            return
        if self._max_bytes is not None and size + n_bytes > self._max_bytes:
            what = f"page files would take {_exactly(size + n_bytes)} of disk, {_exactly(self._max_bytes)} are allowed"
            raise RunError(what, where=str(self.path), fix="allow more disk, or page less out")
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), size, n_bytes)
            else:  # macOS: the blocks come with the writes
                os.ftruncate(self._file.fileno(), size + n_bytes)
        except OSError as error:
            with suppress(OSError):  # what a failed reservation may have kept
                os.ftruncate(self._file.fileno(), size)
            raise self._failure("cannot reserve space", n_bytes, error) from None
        self._extents.grow(n_bytes)

    def _check_open(self) -> None:
        if self._closed:
            raise RunError("the page file is closed", where=str(self.path))

    def _failure(self, what: str, n_bytes: int, error: OSError) -> RunError:
        amount = f", {_exactly(n_bytes)}" if n_bytes else ""
        fix = _ADVICE.get(error.errno or 0, "choose another page folder")
        return RunError(f"{what}{amount}: {error.strerror or error}", where=str(self.path), fix=fix)


def _round_up(n_bytes: int) -> int:
    return -(-n_bytes // GRAIN) * GRAIN


def _as_bytes(data: memoryview) -> memoryview:
    return data.cast("B") if data.nbytes else memoryview(b"")
