"""The heap: its holes are given back where the resident set comes near what was predicted, and not before."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lopt_edge.system.allocator import STRIDE_BYTES, HeapWatch

MIB = 1 << 20


class Heap:
    """A resident set that trimming brings down to `least`."""

    def __init__(self, least: int) -> None:
        self.now, self.least, self.renewed = least, least, 0

    def trim(self) -> None:
        self.now = self.least

    def trimmed(self) -> None:
        self.renewed += 1


def watch(heap: Heap, most: int) -> HeapWatch:
    return HeapWatch(most, trimmed=heap.trimmed, resident=lambda: heap.now, trim=heap.trim)


def looked(heap: Heap, watched: HeapWatch, *sizes: int) -> int:
    """How often it trims at these resident sets."""
    before = watched.n_trims
    for size in sizes:
        heap.now = size
        watched.look()
    return watched.n_trims - before


def test_holes_are_given_back_at_the_limit_only():
    heap = Heap(400 * MIB)
    watched = watch(heap, 500 * MIB)
    assert looked(heap, watched, 400 * MIB, 499 * MIB, 450 * MIB) == 0
    assert looked(heap, watched, 500 * MIB) == heap.renewed == 1 and heap.now == 400 * MIB
    assert looked(heap, watched, 499 * MIB, 501 * MIB) == 1


def test_where_tensors_alone_take_that_much_it_trims_at_each_stride():
    heap = Heap(510 * MIB)
    watched = watch(heap, 500 * MIB)
    assert looked(heap, watched, 510 * MIB) == 1
    assert looked(heap, watched, 510 * MIB, 510 * MIB + STRIDE_BYTES - 1) == 0
    assert looked(heap, watched, 510 * MIB + STRIDE_BYTES) == 1
    assert looked(heap, watched, 450 * MIB, 500 * MIB) == 1, "once it was below, the limit counts again"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_a_real_heaps_holes_go_back_to_the_system():
    """In a process of its own: blocks below the mmap threshold, each second one freed, the last one kept."""
    code = """
from lopt_edge.system.allocator import HeapWatch, release_free_memory, settle_host_allocator
from lopt_edge.system.memory import resident_bytes
import torch
settle_host_allocator()
release_free_memory()
before = resident_bytes()
held = [torch.ones(1 << 18) for _ in range(128)]  # of 1 MiB
full = resident_bytes()
del held[::2]
holes = resident_bytes()
watched = HeapWatch(before + (96 << 20))
watched.look()
after = resident_bytes()
print(*((n - before) >> 20 for n in (full, holes, after)), watched.n_trims)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full, holes, after, n_trims = map(int, done.stdout.split())
    assert full >= 120 and holes >= 96, "freed, and resident all the same"
    assert after <= 80 and n_trims == 1
