"""Page-locked host memory, from which a GPU copies without the CPU's help. On a machine without a GPU it is plain memory.

torch's own pinned allocator rounds every block up to a power of two, which at a gigabyte a tensor is a budget of its own;
so a block here has its exact size: plain memory that is registered with the driver. Freed blocks are kept for the next
tensor of the same size and given back when the pool would pass its limit. Where registering is refused (WSL,
containers), the pool says so once and hands out pageable memory: copies then wait for the CPU, results are the same.
"""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lopt_edge.run.device import device_of


class PinnedPool:
    """A pool of blocks of bytes (uint8, one dimension). `limit_bytes` bounds what is pinned; None: no bound."""

    def __init__(self, device: torch.device, *, limit_bytes: int | None = None) -> None:
        self.device, self.limit_bytes = device_of(device), limit_bytes
        self.refused = False
        self.pinned_bytes = self.peak_pinned_bytes = 0
        self.used_bytes = self.peak_bytes = 0
        self._free: dict[int, list[tuple[Tensor, Any]]] = defaultdict(list)
        self._pinned: set[int] = set()
        self._lock = threading.Lock()

    @property
    def is_tier(self) -> bool:
        """Whether the pool's blocks are a tier of their own, below the device."""
        return self.device.kind.host_is_below

    def take(self, n_bytes: int) -> Tensor:
        """A block of exactly this size; its content is undefined."""
        with self._lock:
            self.used_bytes += n_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            if self._free[n_bytes]:
                block, event = self._free[n_bytes].pop()
                if event is not None:
                    event.synchronize()
                return block
            return self._fresh(n_bytes)

    def _fresh(self, n_bytes: int) -> Tensor:
        block = torch.empty(n_bytes, dtype=torch.uint8)
        if not self.is_tier or self.refused:
            return block
        if self.limit_bytes is not None and self.pinned_bytes + n_bytes > self.limit_bytes:
            self._shrink()
        within = self.limit_bytes is None or self.pinned_bytes + n_bytes <= self.limit_bytes
        if not within or not self.device.pin(block):
            if not self.refused:
                reason = "its budget is used up" if not within else "the driver refused it"
                warnings.warn(f"no more pinned host memory ({reason}): copies go through pageable memory", stacklevel=2)
            self.refused = True
            return block
        self._pinned.add(block.data_ptr())
        self.pinned_bytes += n_bytes
        self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)
        return block

    def give(self, block: Tensor, *, after: Any = None) -> None:
        """Give a block back; it may be used again once the mark `after` has passed."""
        with self._lock:
            self.used_bytes -= block.nbytes
            if self.is_tier:  # plain memory goes back to the allocator
                self._free[block.nbytes].append((block, after))

    def _shrink(self) -> None:
        for blocks in self._free.values():
            for block, event in blocks:
                if event is not None:
                    event.synchronize()
                self._unpin(block)
        self._free.clear()

    def _unpin(self, block: Tensor) -> None:
        if block.data_ptr() in self._pinned:
            self.device.unpin(block)
            self._pinned.discard(block.data_ptr())
            self.pinned_bytes -= block.nbytes

    def close(self) -> None:
        """Give the free blocks back to the system."""
        with self._lock:
            self._shrink()
