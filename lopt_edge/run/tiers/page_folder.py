"""The folder of page files: where it lies, whether it can be written, what an earlier run left in it.

The rule: a folder in memory (tmpfs) is refused, since pages there would take what they are to spare; a refusal says which
folder and what to do. The files in it are page_file.py's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lopt_edge.errors import InputError, raise_collected
from lopt_edge.run.tiers.page_file import _OTHER_FOLDER, _PAGE_FILE, _WHERE, _exactly
from lopt_edge.system.file_systems import MEMORY_FILE_SYSTEMS, MOUNTS, _file_system, _nearest


@dataclass(frozen=True)
class PageDir:
    """A folder for page files; `file_system` is its type, None where the system does not tell."""

    path: Path
    file_system: str | None
    free_bytes: int

    @property
    def is_memory(self) -> bool:
        return self.file_system in MEMORY_FILE_SYSTEMS


def check_page_dir(path: Path, *, need_bytes: int, disk_budget_bytes: int | None, mounts: Path = MOUNTS) -> PageDir:
    """Whether `path` may hold `need_bytes` of page files; InputError where it may not. Touches stale page files only."""
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
    """Make `path` ready for `need_bytes` of page files; InputError where that cannot be. Call before any PageFile."""
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
    """Page files whose process is gone, or had our pid before us; what cannot be removed is another user's, and stays."""
    for entry in os.scandir(folder):
        named = _PAGE_FILE.fullmatch(entry.name)
        if named and entry.is_file(follow_symlinks=False):
            pid = int(named[1])
            if pid == os.getpid() or not psutil.pid_exists(pid):
                with suppress(OSError):
                    os.unlink(entry.path)
