"""What a run really takes: peak resident set, peak device bytes, seconds by phase.

On a machine without GPU the device tier is RAM: the peak is the process' resident set, libraries and loading included
(VmHWM of /proc/self/status, or getrusage where there is no /proc). On CUDA it is the allocator's peak of reserved bytes.
It reads; it never limits.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


def peak_rss_bytes() -> int:
    """The largest resident set this process ever had."""
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident set now (where that is unknown, the largest one so far)."""
    now = _status_bytes("VmRSS")
    return peak_rss_bytes() if now is None else now


def _status_bytes(field: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []  # no /proc on macOS
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_device_bytes(device: torch.device) -> int:
    """The device tier's peak: reserved bytes on CUDA, the resident set on the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_rss_bytes()


class PhaseClock:
    """Seconds by phase of a run (load, quantise, train, save, ...); phases add up over repeated entries."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def go_on_from(self, seconds: Mapping[str, float]) -> None:
        """Add what an earlier part of the run took."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
