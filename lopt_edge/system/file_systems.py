"""File systems: of which kind the one under a path is, and whether it has room.

The rule: a path that does not exist yet is judged by the nearest folder that does. Linux' /proc is read; where there is
none the answer is "unknown", not an error.
"""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from lopt_edge.errors import InputError
from lopt_edge.units import format_bytes


def path_fault(path: str) -> str | None:
    """Why the text can be no path on this system (too long, a zero byte, a loop of links); None if it can."""
    try:
        Path(path).expanduser().lstat()
    except OSError as error:
        return f"can be no path ({error.strerror})" if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else None
    except (ValueError, RuntimeError) as error:  # a zero byte; ~ of nobody
        return f"can be no path ({error})"
    return None


def check_free_space(folder: Path, *, need_bytes: int, what: str) -> None:
    """Check the disk of `folder`: raise InputError if less than `need_bytes` is free; `what` needs it."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise InputError(
            f"{what} need up to {format_bytes(need_bytes)}, {format_bytes(free)} are free there",
            where=str(folder),
            fix="free space, or choose another output folder",
        )


MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
MOUNTS = Path("/proc/self/mounts")


def memory_file_system(path: Path, *, mounts: Path = MOUNTS) -> str | None:
    """The type of the file system that holds `path`, or would, if that is memory; None for a disk, or where unknown."""
    kind = _file_system(_nearest(path.absolute()).resolve(), mounts)
    return kind if kind in MEMORY_FILE_SYSTEMS else None


def _nearest(path: Path) -> Path:
    """The folder where `path` would lie: itself, or the first folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _file_system(folder: Path, mounts: Path) -> str | None:
    """The type of the file system that holds `folder`, which has no symbolic link in it."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None  # no Linux
    rows = [fields for fields in (line.split(" ") for line in lines) if len(fields) > 2]
    points = [(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), row[1]), row[2]) for row in rows]
    held = [(len(point), at, kind) for at, (point, kind) in enumerate(points) if folder.is_relative_to(point)]
    return max(held)[2] if held else None  # of two mounts on one point the later one is seen
