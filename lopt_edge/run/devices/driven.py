"""Streams and counters of a GPU that torch drives by a module of its own: `torch.cuda`, `torch.xpu`.

The rule: these modules answer to the same names, so what is asked of a stream and of the allocator's counters stands here
once, and a device's file says which module it is. The module is asked when something is needed, never before: where there
is no such GPU it may be all but empty.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


class DrivenStream:
    """A stream beside the one that computes. `module` is torch's of this kind of GPU."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module, self.device = module, device
        self.stream = module.Stream(device)

    def record_event(self) -> Any:
        return self.stream.record_event()

    def mark_compute(self) -> Any:
        return self.module.current_stream(self.device).record_event()

    def after(self, mark: Any) -> AbstractContextManager[Any]:
        if mark is not None:
            self.stream.wait_event(mark)
        found: AbstractContextManager[Any] = self.module.stream(self.stream)
        return found

    def hold_compute(self, mark: Any) -> None:
        self.module.current_stream(self.device).wait_event(mark)

    def synchronize(self) -> None:
        self.stream.synchronize()


class DrivenCounters:
    """What torch's allocator of this kind of GPU counts."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module, self.device = module, device

    @property
    def live_bytes(self) -> int:
        return int(self.module.memory_allocated(self.device))

    @property
    def peak_bytes(self) -> int:
        return int(self.module.max_memory_allocated(self.device))

    def start_peak(self) -> None:
        self.module.reset_peak_memory_stats(self.device)
