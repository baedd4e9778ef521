"""The processor, as the operating system names it. It measures nothing, and asks torch nothing."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The processor's name: the model that the first core has."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()  # ARM Linux names no model, macOS has no /proc
