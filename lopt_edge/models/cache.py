"""Where copies and small files of models are kept on this machine, unless the settings name a place."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LOPT_EDGE_CACHE"


def default_cache() -> Path:
    """The folder of 4-bit copies, and of GGUF files' small files, where the settings name none."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lopt-edge"
