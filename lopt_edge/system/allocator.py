"""The host allocator, settled once for the process: the memory of large freed tensors goes back to the system.

glibc raises its mmap threshold to the size of the largest block freed so far (up to 32 MiB) and then serves tensors from
its heap, where a freed tensor's memory stays resident between smaller ones that live on. With a fixed threshold each
larger tensor is a mapping of its own and vanishes when freed, at the price of fresh, zeroed pages each time. Measured,
Qwen2.5-0.5B shape, e2e, 512 tokens, fp32, 2 cores (mmap / trim threshold: step seconds, peak MiB):
    glibc's own 10.9, 1,096 | 12 / 1 MiB 10.5, 1,075 | 4 / 32 MiB 10.7, 1,033 | 2 / 64 MiB 11.4, 1,053 | 1 / 1 MiB 12.7, 929
The seconds below 4 MiB are the kernel's, for zeroing pages. Transparent huge pages did not help (12.9 s at 1 MiB). So
4 / 32: it takes the MLP's intermediates off the heap and leaves hidden states on it. Smaller peaks have to come from
smaller intermediates and reused buffers.

Where graphs are kept or paged, hidden states must not be on the heap: torch asks for aligned blocks, and a freed one is
some bytes too small for the next of its size. The same shape at 1,024 tokens, whose hidden states have 3.5 MiB (threshold
4 MiB / 3.1 MiB: step seconds, peak MiB): paged 17.4, 1,490 / 18.5, 865; kept 17.2, 1,772 / 18.1, 1,410; at 256 tokens
kept 5.4, 994 / 5.8, 911. So the plan then asks for a threshold below a hidden state's size (plan/search/workload.py), and
the arithmetic pays up to a tenth for fresh pages.

What stays on the heap leaves holes there all the same, above all where sequences vary in length: a process of the
SmolLM2-135M shape (graphs kept, up to 512 tokens) held 170 MiB in use on a heap of 585 MiB after 8 steps, all of it
resident and all in the main arena (threads' arenas held nothing). malloc_trim gives back the pages inside such holes, too;
with it before each op a process takes its libraries, its tensors and 22 to 27 MiB, whatever the shape. But fresh pages cost
(0.85 ms a MiB here, 3.3 us a page, virtualised; 0.02 for a reused one), so `HeapWatch` trims only where the resident set
comes near what was predicted: below that holes cost nobody anything, above it the run would take more than was said.

It does nothing where the C library is not glibc (macOS, musl, Windows), and nothing for CUDA memory.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable

from lopt_edge.system.memory import resident_bytes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_BYTES, LEAST_MMAP_BYTES = 4 << 20, 128 << 10  # from which size on a block is a mapping of its own: usually, at least
TRIM_BYTES = 32 << 20
STRIDE_BYTES = 8 << 20  # by which the resident set grows before it is trimmed again, where trimming did not bring it down


def settle_host_allocator(mmap_bytes: int = MMAP_BYTES) -> bool:
    """Fix the thresholds; True where that was possible. Larger blocks than `mmap_bytes` are mappings of their own."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, mmap_bytes) and mallopt(M_TRIM_THRESHOLD, TRIM_BYTES))


def release_free_memory() -> None:
    """Give the heap's free pages back to the system: after loading, when many short-lived objects are gone."""
    gc.collect()
    _trim()


def _trim() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class HeapWatch:
    """A watch that gives the heap's holes back when the resident set reaches `most_bytes`; `trimmed` is called then."""

    def __init__(
        self,
        most_bytes: int,
        *,
        trimmed: Callable[[], None] = lambda: None,
        resident: Callable[[], int] = resident_bytes,
        trim: Callable[[], None] = _trim,
    ) -> None:
        self.most_bytes = self._next = most_bytes
        self._trimmed, self._resident, self._trim = trimmed, resident, trim
        self.n_trims = 0

    def look(self) -> None:
        """Look at the resident set, which takes some 15 us; where tensors alone take that much, trim at each stride."""
        now = self._resident()
        if now < self.most_bytes:
            self._next = self.most_bytes
        if now < self._next:
            return
        self._trim()
        self.n_trims += 1
        self._next = max(self.most_bytes, self._resident() + STRIDE_BYTES)
        self._trimmed()
