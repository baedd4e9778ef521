"""The folder of page files: where it lies, whether it can be written, what an earlier run left in it.

`check_page_dir` looks and makes nothing, `prepare_page_dir` looks and makes the folder. They refuse what would fail later
or lie: a file in the folder's place, a folder that cannot be written, too little free space, more than the disk
budget, and file systems that are memory (tmpfs, ramfs), where paging out would take the memory that it is to free. A
refusal says which folder and what to do. The file system is that of the longest mount point in /proc/self/mounts; without
that file (macOS) it is unknown and passes. What it cannot see: a disk image, an overlay or a network file system that
itself lies in memory, and quotas. The files in the folder are page_file.py's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lopt_edge.errors import InputError, raise_collected
from lopt_edge.run.tiers.page_file import _OTHER_FOLDER, _PAGE_FILE, _WHERE, _exactly
from lopt_edge.system.file_systems import MEMORY_FILE_SYSTEMS, MOUNTS, _file_system, _nearest
from quant.locks import Held, lock


@dataclass(frozen=True)
class PageDir:
    """A folder for page files; `file_system` is its type, None where that is not known."""

    path: Path
    file_system: str | None
    free_bytes: int

    @property
    def is_memory(self) -> bool:
        """Whether the folder lies in memory."""
        return self.file_system in MEMORY_FILE_SYSTEMS


def check_page_dir(path: Path, *, need_bytes: int, disk_budget_bytes: int | None, mounts: Path = MOUNTS) -> PageDir:
    """Check that `path` may have `need_bytes` of page files, and remove stale ones. Raises InputError where it may not."""
    path = path.absolute()
    with _refused_where_unwritable(path):
        existing = _nearest(path)
        if not existing.is_dir():
            raise InputError(f"{existing} is a file", where=_WHERE, fix="choose a folder, or a name that is free")
        if existing == path:
            _remove_stale(path)
        found = PageDir(path, _file_system(existing.resolve(), mounts), shutil.disk_usage(existing).free)
        raise_collected(_refusals(found, need_bytes, disk_budget_bytes))
    return found


def prepare_page_dir(path: Path, *, need_bytes: int, disk_budget_bytes: int | None, mounts: Path = MOUNTS) -> PageDir:
    """Check `path` as `check_page_dir` does and make the folder; to be called before any PageFile. Raises InputError."""
    found = check_page_dir(path, need_bytes=need_bytes, disk_budget_bytes=disk_budget_bytes, mounts=mounts)
    with _refused_where_unwritable(found.path):
        found.path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=found.path).close()
    return found


@contextmanager
def _refused_where_unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write in {path} ({reason})", where=_WHERE, fix="choose a folder that you may write in"
        ) from None


def _refusals(found: PageDir, need_bytes: int, disk_budget_bytes: int | None) -> list[InputError]:
    if found.is_memory:
        what = f"{found.path} lies in memory, not on a disk (file system {found.file_system}): paging there frees nothing"
        return [InputError(what, where=_WHERE, fix="choose a folder on a disk")]
    refusals = []
    if found.free_bytes < need_bytes:
        what = f"{found.path} has {_exactly(found.free_bytes)} free, page files need {_exactly(need_bytes)}"
        refusals.append(InputError(what, where=_WHERE, fix=f"free some space, or {_OTHER_FOLDER}"))
    if disk_budget_bytes is not None and need_bytes > disk_budget_bytes:
        what = f"page files need {_exactly(need_bytes)} of disk, the budget allows {_exactly(disk_budget_bytes)}"
        refusals.append(InputError(what, where="disk_memory", fix="allow more disk, or more memory on the tiers above"))
    return refusals


def _remove_stale(folder: Path) -> None:
    """Remove page files that no process has locked: theirs is gone. What cannot be removed is another user's."""
    for entry in os.scandir(folder):
        if _PAGE_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            with suppress(OSError, Held):
                descriptor = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    if lock(descriptor):
                        os.unlink(entry.path)
                finally:
                    os.close(descriptor)
