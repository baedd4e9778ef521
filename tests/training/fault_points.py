"""Fault injection: every write and read of a run's own files, counted, and one of them failing. Not a test itself.

A *point* is one call that touches the disk: a write to a file opened for writing, a positioned read or write, a
reservation, a sync, a rename, each on a file below a folder of ours. `Points.count` runs something once and lists them;
`Points.fail` runs it again with one point failing as a disk fails: no space, an I/O error, a read that ends too early, or
only slowly. What the run must do then is the tests' matter.
"""

from __future__ import annotations

import errno
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FAULTS = ("full", "broken", "short", "slow")
NUMBERS = {"full": errno.ENOSPC, "broken": errno.EIO}
SLOW_SECONDS = 0.05
READS = ("preadv",)
KINDS = {"checkpoints": "checkpoint", ".pages": "pages", "cache": "cache", "metrics.jsonl": "log", "events.jsonl": "log"}


@dataclass(frozen=True)
class Point:
    """The n-th call of a run: the system call and the file."""

    number: int
    call: str
    path: str

    @property
    def kind(self) -> str:
        """What the file belongs to: a checkpoint, pages, the quantised cache, a log, or the result."""
        return next((kind for part, kind in KINDS.items() if part in self.path), "result")

    def can(self, fault: str) -> bool:
        if fault == "short":
            return self.call in READS
        return not (fault == "full" and self.call in READS)


class _File:
    """A file whose writes are points."""

    def __init__(self, file: Any, path: str, points: Points) -> None:
        self._file, self._path, self._points = file, path, points

    def write(self, data: Any) -> Any:
        self._points.touch("write", self._path)
        return self._file.write(data)

    def truncate(self, *size: int) -> Any:
        return self._file.truncate(*size)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Points:
    """Counts points below `root`, and lets one fail."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.found, self.lock = str(root), [], threading.Lock()
        self.failing, self.fault, self.shortened = -1, "", False
        self._patch(monkeypatch)

    def count(self, run: Callable[[], object]) -> list[Point]:
        with self._armed(-1, ""):
            run()
        return list(self.found)

    def fail(self, point: Point, fault: str, run: Callable[[], object]) -> object:
        """Run with this point failing; what the run returned or raised."""
        with self._armed(point.number, fault):
            return run()

    @contextmanager
    def _armed(self, number: int, fault: str) -> Iterator[None]:
        self.found, self.failing, self.fault, self.active = [], number, fault, True
        try:
            yield
        finally:
            self.active = False

    active = False

    def touch(self, call: str, path: str) -> bool:
        """One point; True if a read is to end too early."""
        if not self.active or not path.startswith(self.root):
            return False
        with self.lock:
            number = len(self.found)
            self.found.append(Point(number, call, path))
        if number != self.failing:
            return False
        if self.fault == "slow":
            time.sleep(SLOW_SECONDS)
        elif self.fault != "short":
            raise OSError(NUMBERS[self.fault], os.strerror(NUMBERS[self.fault]), path)
        return self.fault == "short"

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_open = pathlib.Path.open

        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = real_open(path, mode, *arguments, **options)
            writes = any(letter in mode for letter in "wax+")
            return _File(file, str(path), self) if writes and self.active else file

        monkeypatch.setattr(pathlib.Path, "open", opened)
        for call in ("pwrite", "fsync", "posix_fallocate"):
            monkeypatch.setattr(os, call, self._by_descriptor(call, getattr(os, call)))
        for call in ("replace", "rename"):
            monkeypatch.setattr(os, call, self._by_path(call, getattr(os, call)))
        preadv = os.preadv

        def read(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
            short = self.touch("preadv", path_of(descriptor))
            return 0 if short else preadv(descriptor, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", read)

    def _by_descriptor(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def patched(descriptor: int, *arguments: Any) -> Any:
            self.touch(call, path_of(descriptor))
            return real(descriptor, *arguments)

        return patched

    def _by_path(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def patched(source: Any, target: Any, **options: Any) -> Any:
            self.touch(call, str(target))
            return real(source, target, **options)

        return patched


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) else ""
