"""Page-locked host memory, from which a GPU copies without the CPU's help. On a machine without a GPU it is plain memory.

It is an arena: a few large slabs of memory, each registered with the driver once, out of which blocks of any size are cut,
the first that fits; neighbours that are given back grow together. (torch's own pinned allocator rounds every block up to a
power of two; a pool keyed by exact sizes registered anew for every length of a micro-batch: 3,200 times, 29 GiB, in 100
steps.) A block that a copy still reads or writes is given back with a mark, and is cut out again only once the mark has
passed: first what is free is looked through, then marks are waited for, then the arena grows: by as much again as it has,
but by no more than SLAB_BYTES beyond what is asked for. For a small block the arena grows before anybody waits: those are
what the host sends ahead (staging.py), and a wait would hold all that it launches.

`limit_bytes` bounds what is registered. Beyond it, and where the driver refuses (WSL, containers), blocks are pageable: it
is said once, copies then wait for the CPU, results are the same, and such a block goes back to the system with its last
reference. All registrations end with `close`, so that another run of this process can register.
"""

from __future__ import annotations

import mmap
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lopt_edge.run.device import device_of

SLAB_BYTES, LEAST_SLAB_BYTES = 64 << 20, 1 << 20
GRAIN = 512  # bytes: blocks begin at multiples of it
PAGE = mmap.PAGESIZE


@dataclass(eq=False)
class _Slab:
    """A registered piece of memory. `free` are its free ranges as (start, stop), in order, no two of which touch."""

    memory: Tensor
    free: list[tuple[int, int]] = field(default_factory=list)

    def cut(self, n_bytes: int) -> int | None:
        """Take the first free range of so many bytes out; returns its start, None if there is none."""
        for index, (start, stop) in enumerate(self.free):
            if stop - start >= n_bytes:
                self.free[index : index + 1] = [(start + n_bytes, stop)] if stop - start > n_bytes else []
                return start
        return None

    def put_back(self, start: int, stop: int) -> None:
        """Make a range free again."""
        before = [span for span in self.free if span[1] < start]
        after = [span for span in self.free if span[0] > stop]
        touching = self.free[len(before) : len(self.free) - len(after)]
        merged = (min([start, *(span[0] for span in touching)]), max([stop, *(span[1] for span in touching)]))
        self.free = [*before, merged, *after]


class PinnedPool:
    """An arena of blocks of bytes (uint8, one dimension). `limit_bytes` bounds what is pinned; None: no bound.

    `used_bytes` are those of the blocks that are out, `pinned_bytes` those of the slabs.
    """

    def __init__(self, device: torch.device, *, limit_bytes: int | None = None) -> None:
        self.device, self.limit_bytes = device_of(device), limit_bytes
        self.refused = self.closed = self._said = False
        self.pinned_bytes = self.peak_pinned_bytes = 0
        self.used_bytes = self.peak_bytes = 0
        self._slabs: list[_Slab] = []
        self._out: dict[int, tuple[_Slab, int, int]] = {}  # by address: the slab, and the range in it
        self._leaving: list[tuple[Any, _Slab, int, int]] = []  # given back, with a mark that may not have passed
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
            if not self.is_tier or not n_bytes:
                return torch.empty(n_bytes, dtype=torch.uint8)
            size = -(-n_bytes // GRAIN) * GRAIN
            found = self._find(size)
            if found is None:
                return torch.empty(n_bytes, dtype=torch.uint8)
            slab, start = found
            block = slab.memory[start : start + n_bytes]
            self._out[block.data_ptr()] = (slab, start, start + size)
            return block

    def give(self, block: Tensor, *, after: Any = None) -> None:
        """Give a block back; it may be used again once the mark `after` has passed."""
        with self._lock:
            self.used_bytes -= block.nbytes
            taken = self._out.pop(block.data_ptr(), None) if block.nbytes else None
            if taken is None:
                return  # plain memory goes back to the allocator
            slab, start, stop = taken
            if after is None:
                slab.put_back(start, stop)
            else:
                self._leaving.append((after, slab, start, stop))

    def _find(self, size: int) -> tuple[_Slab, int] | None:
        self._let_in(wait=False)
        if (found := self._cut(size)) is not None:
            return found
        if size >= LEAST_SLAB_BYTES and sum(stop - start for _, _, start, stop in self._leaving) >= size:
            self._let_in(wait=True)
            if (found := self._cut(size)) is not None:
                return found
        if self._grow(size):
            return self._cut(size)
        self._let_in(wait=True)
        return self._cut(size)

    def _cut(self, size: int) -> tuple[_Slab, int] | None:
        for slab in self._slabs:
            if (start := slab.cut(size)) is not None:
                return slab, start
        return None

    def _let_in(self, *, wait: bool) -> None:
        """Make the ranges free whose marks have passed; `wait`: once they have."""
        still = []
        for mark, slab, start, stop in self._leaving:
            if not wait and not mark.query():
                still.append((mark, slab, start, stop))
                continue
            if wait:
                mark.synchronize()
            slab.put_back(start, stop)
        self._leaving = still

    def _grow(self, size: int) -> bool:
        """Register one more slab, of so many bytes at least; False where that is not possible any more."""
        if self.refused or self.closed:
            return False
        usual = max(LEAST_SLAB_BYTES, min(self.pinned_bytes, SLAB_BYTES))
        least, wanted = (-(-n // PAGE) * PAGE for n in (size, max(size, usual)))
        left = None if self.limit_bytes is None else (self.limit_bytes - self.pinned_bytes) // PAGE * PAGE
        n_bytes = wanted if left is None else min(wanted, left)
        if n_bytes < least:
            return self._say("its budget is used up")
        memory = torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=torch.uint8)  # whole pages: no two slabs share one
        if not self.device.pin(memory):
            self.refused = True
            return self._say("the driver refused it")
        self._slabs.append(_Slab(memory, [(0, n_bytes)]))
        self.pinned_bytes += n_bytes
        self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)
        return True

    def _say(self, reason: str) -> bool:
        if not self._said:
            warnings.warn(f"no more pinned host memory ({reason}): copies go through pageable memory", stacklevel=2)
        self._said = True
        return False

    def close(self) -> None:
        """End all registrations, once what was given back has left. Blocks that are still out go on as plain memory."""
        with self._lock:
            self._let_in(wait=True)
            for slab in self._slabs:
                self.device.unpin(slab.memory)
            self._slabs, self._out, self.closed = [], {}, True
            self.pinned_bytes = 0
