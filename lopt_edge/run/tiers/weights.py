"""The decoder layers' packed weights: resident, or streamed through a small ring of buffers.

A layer's packed parts lie in one flat buffer of bytes (of NF4: 7 linear layers x codes, block scales, scales of scales;
64-byte aligned; behind them those of all its experts), and each packed matrix is a set of views into it. `fetch` begins
to fill a free buffer, and `wait` ends that and binds the views, `evict` unbinds them, so that a layer that computes without
its weights fails loudly.
A buffer is overwritten only after the computing stream has passed the point of its eviction. On the CPU bytes come by
positioned reads from the 4-bit files; on CUDA from pinned host copies, or from disk through a pinned staging buffer.

Small things (norms, biases, code maps) are resident always and are not handled here. What is resident is the placement's
matter; which layer comes when is the plan's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lopt_edge.run.tiers.moves import Mover, result_of
from quant.files import read_bytes, tensor_bytes
from quant.headers import TensorEntry
from quant.packed import Packed, PackedOnDisk

ALIGNMENT = 64


class HoldsWeight(Protocol):
    """Whatever computes with a matrix: a linear layer, an expert."""

    weight: Packed | Tensor | None


@dataclass(frozen=True)
class Piece:
    """One part of one linear layer's weight; `start` is its byte offset in the layer's buffer."""

    part: str
    entry: TensorEntry
    start: int


@dataclass(frozen=True)
class LayerLayout:
    """The places of a layer's weights in its buffer; `matrices` are (module, its layout on disk, its pieces)."""

    matrices: tuple[tuple[HoldsWeight, PackedOnDisk, tuple[Piece, ...]], ...]
    n_bytes: int


def lay_out(matrices: Iterable[tuple[HoldsWeight, PackedOnDisk]]) -> LayerLayout:
    """Lay the streamed parts of a layer's matrices one behind the other, each at a multiple of ALIGNMENT bytes."""
    position, found = 0, []
    for module, on_disk in matrices:
        pieces = []
        for part in on_disk.moved:
            if part in on_disk.parts:
                pieces.append(Piece(part, on_disk.parts[part], position))
                position += -(-on_disk.parts[part].n_bytes // ALIGNMENT) * ALIGNMENT
        found.append((module, on_disk, tuple(pieces)))
    return LayerLayout(tuple(found), position)


class Weights:
    """The packed weights of all layers. `placement` maps a layer to resident, host or disk; absent layers are not ours."""

    def __init__(
        self,
        layouts: Mapping[int, LayerLayout],
        placement: Mapping[int, str],
        *,
        maps: Mapping[int, Mapping[str, Tensor]],
        mover: Mover,
    ) -> None:
        self.layouts, self.placement, self.maps, self.mover = dict(layouts), dict(placement), maps, mover
        self.resident: dict[int, Tensor] = {}
        self.host: dict[int, Tensor] = {}
        self._free: list[Tensor] = []
        self._taken: dict[int, tuple[Tensor, Future[None] | None, Any]] = {}
        self.slot_bytes = self._slot_bytes()
        self.n_slots = 0

    def load(self) -> None:
        """Read the weights that lie on the device or the host. Raises FolderError if a file cannot be read."""
        device = self.mover.device
        for layer, place in self.placement.items():
            layout = self.layouts[layer]
            if place == "disk":
                continue
            on_host = (
                self.mover.pinned.take(layout.n_bytes)
                if place == "host"
                else torch.empty(layout.n_bytes, dtype=torch.uint8)
            )
            _read(layout, on_host)
            if place == "host":
                self.host[layer] = on_host
            else:
                self.resident[layer] = on_host.to(device)
                self._bind(layer, self.resident[layer])

    def fetch(self, layer: int) -> None:
        """Begin to bring a streamed layer into a buffer."""
        buffer = self._free.pop() if self._free else self._new_slot()
        mark, layout = self.mover.after_compute(), self.layouts[layer]
        self.mover.bytes_moved += layout.n_bytes
        job: Future[None] | None = None
        event = None
        if layer in self.host:
            event = self._copy(buffer, self.host[layer], mark)
        elif not self.mover.has_streams:
            job = self.mover.submit("fetch", lambda: _read(layout, buffer))
        else:

            def through_staging() -> None:
                staging = self.mover.pinned.take(layout.n_bytes)
                _read(layout, staging)
                self._copy(buffer, staging, mark).synchronize()
                self.mover.pinned.give(staging)

            job = self.mover.submit("fetch", through_staging)
        self._taken[layer] = (buffer, job, event)

    def _copy(self, buffer: Tensor, source: Tensor, mark: Any) -> Any:
        return self.mover.copy_up(buffer[: len(source)], source, after=mark, stage="fetch")

    def wait(self, layer: int) -> None:
        """End the fetch of a layer, whose weights are there from now on. Raises RunError if reading them failed."""
        buffer, job, event = self._taken[layer]
        if job is not None:
            result_of(job)
        self.mover.before_compute(event)
        self._bind(layer, buffer)

    def evict(self, layer: int) -> None:
        """Unbind a fetched layer's weights, and let its buffer be overwritten."""
        buffer, job, event = self._taken.pop(layer)
        if job is not None and not job.done():
            job.exception()  # after a fault elsewhere: never hand out a buffer that is still being written
        self.mover.before_compute(event)  # the same where no WAIT came: who gets the buffer's memory next computes later
        for module, _, _ in self.layouts[layer].matrices:
            module.weight = None
        self._free.append(buffer)

    def evict_all(self) -> None:
        """Evict every fetched layer; for use after a fault."""
        for layer in list(self._taken):
            self.evict(layer)

    def stream(self, layers: Iterable[int]) -> Iterator[int]:
        """Yield the layers in order, each with its weights there while the next one is fetched (evaluation, generation)."""
        order = list(layers)
        streamed = [layer for layer in order if self.placement.get(layer, "resident") != "resident"]
        ahead = iter(streamed)
        try:
            if (first := next(ahead, None)) is not None:
                self.fetch(first)
            for layer in order:
                if layer in streamed:
                    self.wait(layer)
                    if (following := next(ahead, None)) is not None:
                        self.fetch(following)
                yield layer
                if layer in streamed:
                    self.evict(layer)
        finally:
            self.evict_all()

    def forget(self, layers: Iterable[int]) -> None:
        """Let the weights of these layers go for good; nothing may be under way."""
        self.release()
        for layer in layers:
            for by_layer in (self.placement, self.layouts, self.resident, self.host):
                by_layer.pop(layer, None)
        self.slot_bytes = self._slot_bytes()

    def _slot_bytes(self) -> int:
        streamed = [self.layouts[layer].n_bytes for layer, place in self.placement.items() if place != "resident"]
        return max(streamed, default=0)

    def release(self) -> None:
        """Let the ring's buffers go; they are made anew when a layer is fetched."""
        self.evict_all()
        self._free.clear()

    def tensors(self) -> list[Tensor]:
        """The buffers on the device: those of resident layers, and the ring's."""
        return [*self.resident.values(), *self._free, *(buffer for buffer, _, _ in self._taken.values())]

    def _new_slot(self) -> Tensor:
        self.n_slots += 1
        return torch.empty(self.slot_bytes, dtype=torch.uint8, device=self.mover.device)

    def _bind(self, layer: int, buffer: Tensor) -> None:
        for module, on_disk, pieces in self.layouts[layer].matrices:
            tensors = dict(self.maps[id(on_disk)])
            for piece in pieces:
                tensors[piece.part] = buffer[piece.start : piece.start + piece.entry.n_bytes]
            module.weight = on_disk.assemble(tensors)


def _read(layout: LayerLayout, buffer: Tensor) -> None:
    data = tensor_bytes(buffer)
    for _, _, pieces in layout.matrices:
        for piece in pieces:
            read_bytes(piece.entry, data[piece.start : piece.start + piece.entry.n_bytes])
