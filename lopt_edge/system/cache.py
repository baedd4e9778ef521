"""Where copies and small files of models are kept on this machine unless the settings name a place, and if room is left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lopt_edge.errors import InputError
from lopt_edge.units import format_bytes

CACHE_VARIABLE = "LOPT_EDGE_CACHE"


def default_cache() -> Path:
    """The folder of 4-bit copies, and of GGUF files' small files, where the settings name none."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lopt-edge"


def check_room(target: Path, n_bytes: int, *, what: str, where: str, fix: str) -> None:
    """Refuse a disk that has no room for a copy of so many bytes at `target`, called `what`. Raises InputError."""
    existing = next(path for path in target.absolute().parents if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise InputError(f"{what} needs {format_bytes(n_bytes)}, {format_bytes(free)} are free there", where=where, fix=fix)
