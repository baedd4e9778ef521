"""The way up for what the host makes for the device: token ids and positions, rows of the vocabulary, a cache's states.

Each such tensor is written into pinned memory and copied from there on the computing stream, in order with what computes
with it: so the host goes on at once, where a plain `.to(device)` waits for all that was launched before. The room goes back
to the pool with a mark behind the copy. What is written early (a step's first rows, while the step before it computes) may
stay in its room until it is sent.

A tensor of more than MOST_BYTES is not worth pinned memory (a step of so many tokens takes long enough): its room is plain.

The rule: no number is changed, but by a cast that is asked for, which the host does. On a CPU there is no stage
(`Mover.stage` is None): a tensor is where it is needed already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lopt_edge.run.tiers.pinned import PinnedPool

MOST_BYTES = 128 << 20  # a chunk of an 8B's lm_head has 64 MiB


@dataclass(frozen=True, eq=False)
class Room:
    """A tensor in pinned memory, to be written by the host and then sent, or dropped. `block` is None for a plain one."""

    host: Tensor
    block: Tensor | None


class Stage:
    """A device's stage. `mark` puts a mark on the computing stream."""

    def __init__(self, device: torch.device, pinned: PinnedPool, mark: Callable[[], Any]) -> None:
        self.device, self.pinned, self.mark = device, pinned, mark

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Room:
        """Room for a tensor; its content is undefined."""
        n_bytes = prod(shape) * dtype.itemsize
        if n_bytes > MOST_BYTES:
            return Room(torch.empty(shape, dtype=dtype), None)
        block = self.pinned.take(n_bytes)
        return Room(block.view(dtype).view(shape), block)

    def put(self, tensor: Tensor, *, dtype: torch.dtype | None = None) -> Room:
        """Room with the numbers of a tensor of the host, in `dtype` if that is another."""
        room = self.room(tuple(tensor.shape), dtype or tensor.dtype)
        room.host.copy_(tensor)
        return room

    def send(self, room: Room, *, out: Tensor | None = None) -> Tensor:
        """The tensor on the device (in `out`, of the same shape and dtype); the room is given back."""
        if out is None:
            out = torch.empty(room.host.shape, dtype=room.host.dtype, device=self.device)
        out.copy_(room.host, non_blocking=True)
        if room.block is not None:
            self.pinned.give(room.block, after=self.mark())
        return out

    def drop(self, room: Room) -> None:
        """Give a room back that is not sent."""
        if room.block is not None:
            self.pinned.give(room.block)


def brought(stage: Stage | None, tensor: Tensor, device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on the device, in `dtype` if that is another; through the stage, if there is one."""
    if stage is None:
        return tensor.to(device=device, dtype=dtype or tensor.dtype)
    return stage.send(stage.put(tensor, dtype=dtype))
