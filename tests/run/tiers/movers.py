"""Movers on a small page file, gates that hold their movements, and tensors of any bits. Not a test itself."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

from lopt_edge.run.tiers.moves import Delay, Mover, OffloadedTensor
from lopt_edge.run.tiers.page_file import GRAIN, PageFile

CPU = torch.device("cpu")
TIERS = ("disk", "host")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64)
SHAPES = ((), (1,), (3, 5), (2, 3, 4), (GRAIN,), (GRAIN + 1,), (1, 70_001))


def make_mover(folder: Path, *, delay: Delay | None = None, max_bytes: int | None = None) -> Mover:
    return Mover(CPU, page_file=PageFile(folder, n_bytes=GRAIN, name="moves", max_bytes=max_bytes), delay=delay)


class Gate:
    """A delay that holds every movement of one stage until it is opened."""

    def __init__(self, stage: str) -> None:
        self.stage, self.event = stage, threading.Event()

    def __call__(self, stage: str) -> None:
        if stage == self.stage:
            assert self.event.wait(10)

    def open(self) -> None:
        self.event.set()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Random bytes (any bit pattern, NaNs included); random truths."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    n_bytes = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def send(mover: Mover, offloaded: OffloadedTensor, tier: str = "disk") -> None:
    mover.down(offloaded, tier)
    mover.wait(offloaded)


def bring(mover: Mover, offloaded: OffloadedTensor) -> Tensor:
    mover.up(offloaded)
    mover.wait(offloaded)
    return offloaded.here()
