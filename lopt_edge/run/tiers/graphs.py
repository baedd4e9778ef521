"""One layer's autograd graph, from its input to its output, whose saved tensors may be moved to another tier.

Neither the input nor the output is kept here: the gradient of the input is caught by a tap at the graph's beginning, the
gradient of the output is fed in at its end by a seed and belongs to autograd alone from there on (so that it is freed as
soon as it is used). The graph keeps what autograd saved and nothing else.
A movable graph saves through torch's saved_tensors_hooks: every storage that autograd saves becomes one offloaded tensor,
shared by all tensors that view it; what was saved for a branch that does not lead to the output (a router's choice of
experts) is gone with that branch. Frozen parameters, LoRA matrices, what all layers share (rotary tables, masks) and
what does not lie on the device are not the graph's own and stay. `page_out` / `page_in` begin to move all offloaded
tensors, `wait` ends that.

The rule: moving changes no bit. A page that is asked for while it is below raises, it is never fetched silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lopt_edge.run.tiers.moves import Mover, OffloadedTensor

View = tuple[OffloadedTensor, torch.dtype, torch.Size, tuple[int, ...], int | torch.SymInt]


class _Tap(torch.autograd.Function):
    """The identity, whose backward hands the gradient of `what` to the graph. `anchor` makes autograd record it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, graph: LayerGraph, what: str) -> Tensor:
        ctx.graph, ctx.what = graph, what
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.graph.caught[ctx.what] = grads[0]
        return None, None, None, None


class _Seed(torch.autograd.Function):
    """The end of the graph: a scalar whose backward gives the gradients of the output, and of keys that others read."""

    @staticmethod
    def forward(ctx: Any, graph: LayerGraph, output: Tensor, *keys: Tensor) -> Tensor:
        ctx.graph = graph
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seeds, ctx.graph.seeds = ctx.graph.seeds, None
        return None, *seeds


class LayerGraph:
    """The autograd graph of one layer, from its input to its output.

    Call `begin` with the input, run the layer inside `recording`, `end` with the output; later `feed` and `backward`.
    Tensors of `constants` are not the graph's own, and are never moved.
    """

    def __init__(self, mover: Mover, *, movable: bool = False, constants: Iterable[Tensor] = ()) -> None:
        self.mover, self.movable = mover, movable
        self.constants = {tensor.untyped_storage()._cdata for tensor in constants}
        self.pages: dict[int, OffloadedTensor] = {}
        self.saved = WeakValueDictionary[int, OffloadedTensor]()  # while the layer runs: autograd alone holds them
        self.caught: dict[str, Tensor] = {}  # gradients of the input, and of keys and values of another layer
        self.root: Tensor | None = None
        self.seeds: tuple[Tensor | None, ...] | None = None
        self.ends: tuple[int, ...] = ()  # which of keys and values have a graph here

    def begin(self, hidden: Tensor, *, needs_gradient: bool) -> Tensor:
        """The tensor with which the layer is to be run; the graph catches its gradient if it needs one."""
        if not needs_gradient:
            return hidden.detach()
        return self._tap(hidden, "input")

    def _tap(self, tensor: Tensor, what: str) -> Tensor:
        tapped: Tensor = _Tap.apply(tensor.detach(), torch.empty(0, requires_grad=True), self, what)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return tapped

    def tap_keys(self, keys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Another layer's keys and values, with which the layer is to be run; the graph catches their gradients."""
        return self._tap(keys[0], "keys"), self._tap(keys[1], "values")

    def take_key_gradients(self) -> tuple[Tensor, Tensor] | None:
        """The gradients of another layer's keys and values, once; None where there are none."""
        found = self.caught.pop("keys", None), self.caught.pop("values", None)
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def disown(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors, which the layer makes, as constants: others keep them."""
        self.constants |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def recording(self) -> AbstractContextManager[Any]:
        """A context in which a movable graph saves its tensors as offloaded ones."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, self._give) if self.movable else nullcontext()

    def end(self, output: Tensor, keys: tuple[Tensor, ...] = ()) -> Tensor:
        """End the graph at the layer's output, and at keys and values whose gradients will come; returns the output without
        its graph."""
        self.ends = tuple(place for place, tensor in enumerate(keys) if tensor.requires_grad)
        self.root = _Seed.apply(self, output, *(keys[place] for place in self.ends))  # type: ignore[no-untyped-call]  # torch's apply has no types
        self.pages = dict(self.saved)
        return output.detach()

    def _save(self, tensor: Tensor) -> Tensor | View:
        storage = tensor.untyped_storage()
        address = storage._cdata  # of the storage itself: an address of bytes is not one where there are none
        elsewhere = tensor.device.type != self.mover.device.type  # it would come back on the device
        if isinstance(tensor, nn.Parameter) or address in self.constants or elsewhere or not tensor.numel():
            return tensor
        if (page := self.saved.get(address)) is None:
            page = OffloadedTensor(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            self.saved[address] = page
        return page, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _give(self, saved: Tensor | View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        offloaded, dtype, shape, stride, offset = saved
        flat = offloaded.here()
        return torch.empty(0, dtype=dtype, device=flat.device).set_(flat.untyped_storage(), offset, shape, stride)

    def feed(self, grad: Tensor, keys: tuple[Tensor, ...] = ()) -> None:
        """Take the gradient of the output, with which `backward` begins, and those of keys and values; the caller must not
        keep them any longer."""
        self.seeds = (grad, *(keys[place] if keys else None for place in self.ends))

    def backward(self) -> Tensor | None:
        """Accumulate the adapters' gradients; returns the gradient of the input, None where that needs none.

        Raises RuntimeError before `end` and `feed`.
        """
        root, self.root = self.root, None
        if root is None or self.seeds is None:
            raise RuntimeError("this graph was not ended, or has no gradient to begin with")
        torch.autograd.backward(root)
        return self.caught.pop("input", None)

    @property
    def page_bytes(self) -> int:
        """The bytes of the graph's offloaded tensors that are on the device now."""
        return sum(offloaded.tensor.nbytes for offloaded in self.pages.values() if offloaded.tensor is not None)

    def page_out(self, tier: str) -> None:
        """Begin to move all offloaded tensors to `tier`."""
        for offloaded in self.pages.values():
            self.mover.down(offloaded, tier)

    def page_in(self) -> None:
        """Begin to bring all offloaded tensors back."""
        for offloaded in self.pages.values():
            self.mover.up(offloaded)

    def wait(self) -> None:
        """End the movements under way. Raises RunError if one failed."""
        for offloaded in self.pages.values():
            self.mover.wait(offloaded)

    def free(self) -> None:
        """Let all that the graph keeps go, on the device and below."""
        for offloaded in self.pages.values():
            self.mover.free(offloaded)
        self.pages, self.root, self.seeds = {}, None, None
