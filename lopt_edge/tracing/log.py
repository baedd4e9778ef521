"""Every allocation and release of a step, in order, with marks where a module of ours works.

Releases are those of storages, so that views count as what they view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lopt_edge.run.watch.tracker import MemoryTracker


@dataclass
class Event:
    """An event: `kind` is "+" (allocation `number`), "-" (its release) or a mark's text; `value`: not done in a
    recomputation."""

    kind: str
    number: int = -1
    n_bytes: int = 0
    shape: tuple[int, ...] = ()
    value: bool = False


class EventLog(MemoryTracker):  # type: ignore[no-untyped-call]  # torch's mode has no types
    """A log of every allocation and release, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.numbers: dict[int, int] = {}
        self.n_allocated = 0
        self.in_value = False  # inside a product that a recomputation leaves out

    def _see(self, storage: torch.UntypedStorage) -> None:
        known = storage._cdata in self._sizes
        super()._see(storage)
        if not known and storage._cdata in self._sizes:
            self.numbers[storage._cdata] = self.n_allocated
            self.events.append(Event("+", self.n_allocated, storage.nbytes(), value=self.in_value))
            self.n_allocated += 1

    def _forget(self, key: int) -> None:
        super()._forget(key)
        self.events.append(Event("-", self.numbers.pop(key)))

    @contextmanager
    def value(self, left_out: bool) -> Iterator[None]:
        """A context in which what happens is the value of a layer's last product, if `left_out` says so."""
        self.in_value = left_out
        yield
        self.in_value = False

    def mark(self, text: str, *shape: int) -> None:
        self.events.append(Event(f"!{text}", shape=shape, value=self.in_value))

    def number(self, tensor: Tensor | None) -> int:
        return -1 if tensor is None else self.numbers.get(tensor.untyped_storage()._cdata, -1)
