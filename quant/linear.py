"""A linear layer on a packed weight with a LoRA branch, whose graph keeps only its input.

y = x W^T + bias + s (x A) B with A (in, r) and B (r, out), the papers' convention (peft stores both transposed).
The backward is written by hand (MeSP, arXiv 2602.13069, derives the same):
    dB = s (x A)^T g      dA = s x^T (g B^T)      dx = g W + s (g B^T) A^T
The rule: no dequantised weight outlives the product that it was made for. It is written into one `UnpackBuffer` shared by
all layers of a device, in forward and again in backward; where dx is not needed (the first layer of a segment) the
backward does not unpack at all. x A is recomputed (rank r: cheap). Without adapters not even x is kept.
`value_needed = False` leaves the product out and returns zeros of its shape: for the last linear layer of a recomputed
layer, whose output nobody reads (its backward needs its input alone).
Dropout acts on the LoRA branch's input. Its mask is a function of a key that the caller sets, so that a recomputation
draws the same mask; the backward draws it again instead of keeping it.
A layer may have no weight of its own, but one made of other layers' (`synthesis`, quant/mixed.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quant.packed import Packed
from quant.products import product_in_fp32


class UnpackBuffer:
    """A flat buffer per device and dtype, grown to the largest weight seen; every view is void after the next `view`."""

    def __init__(self) -> None:
        self.flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def view(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous (rows, columns) view of the buffer."""
        n_elements = shape[0] * shape[1]
        flat = self.flat.get((device, dtype))
        if flat is None or flat.numel() < n_elements:
            self.flat.pop((device, dtype), None)
            flat = self.flat[device, dtype] = torch.empty(n_elements, dtype=dtype, device=device)
        return flat[:n_elements].view(shape)


@dataclass(eq=False)
class DropoutClock:
    """The point at which a run is, for dropout masks: a mask is a function of (seed, step, micro-batch, layer, module)."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    active: bool = False

    def key(self, layer: int, module: int) -> int:
        """The 63-bit key of a module's mask; the five numbers are mixed one after the other (splitmix64's finaliser)."""
        state = 0
        for number in (self.seed, self.step, self.micro_batch, layer, module):
            state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            state ^= state >> 31
        return state >> 1


def dropout_mask(like: Tensor, *, rate: float, key: int) -> Tensor:
    """A mask of zeros and 1 / (1 - rate) in the shape and dtype of `like`, the same for the same key and device kind."""
    generator = torch.Generator(device=like.device).manual_seed(key)
    return torch.empty_like(like).bernoulli_(1 - rate, generator=generator).div_(1 - rate)


class Synthesis(Protocol):
    """A way to make a layer's output without a weight of its own."""

    def apply(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """The output (..., out) of `layer` for x (..., in), its LoRA branch included."""


class PackedLinear(nn.Module):
    """A linear layer over a packed weight; `lora_a` (in, r) and `lora_b` (r, out) are fp32 or absent.

    Input (..., in) in the compute dtype, output (..., out) in the same. The bias is kept in the compute dtype.
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, buffer: UnpackBuffer) -> None:
        super().__init__()
        self.in_features, self.out_features, self.buffer = in_features, out_features, buffer
        self.weight: Packed | Tensor | None = None  # a plain matrix where a 4-bit folder left it unpacked
        self.synthesis: Synthesis | None = None  # instead of a weight
        self.bias: Tensor | None = None
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.scale = 0.0
        self.dropout_rate = 0.0
        self.clock: DropoutClock | None = None
        self.position = (0, 0)  # (layer, module): this layer's share of the dropout key
        self.value_needed = True

    def attach(self, lora_a: nn.Parameter, lora_b: nn.Parameter, *, scale: float) -> None:
        """Put a LoRA branch on: A (in, r), B (r, out), scale = alpha / r."""
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale

    def forward(self, x: Tensor) -> Tensor:
        """The output (..., out) for x (..., in). Raises RuntimeError if the weight is not resident."""
        if self.synthesis is not None:
            return self.synthesis.apply(self, x)
        key = self.dropout_key()
        y: Tensor = _PackedLinearFunction.apply(x, self.lora_a, self.lora_b, self, key)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return y

    def dropout_key(self) -> int | None:
        """The key of this call's dropout mask; None where there is no dropout."""
        on = self.dropout_rate > 0 and self.lora_a is not None and self.clock is not None and self.clock.active
        return self.clock.key(*self.position) if on and self.clock is not None else None

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight (out, in) in the shared buffer; void after any other layer's call.

        Raises RuntimeError if the weight is not resident.
        """
        if self.weight is None:
            raise RuntimeError("the weight of this layer is not resident")
        if isinstance(self.weight, Tensor):
            return self.weight.to(dtype)
        return self.weight.unpack_into(self.buffer.view(self.weight.shape, dtype, self.weight.device))


def add_lora(
    layer: PackedLinear, flat: Tensor, a: Tensor | None, b: Tensor | None, key: int | None, *, into: Tensor
) -> None:
    """Add the LoRA branch of `flat` (N, in) to `into` (N, out)."""
    if a is None or b is None:
        return
    dropped = flat if key is None else flat * dropout_mask(flat, rate=layer.dropout_rate, key=key)
    into.addmm_(dropped @ a.to(flat.dtype), b.to(flat.dtype), alpha=layer.scale)


def lora_gradients(
    layer: PackedLinear,
    flat: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    key: int | None,
    dx: Tensor | None,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (dA, dB) that are `needed`, from the gradient g (N, out) of the output.

    The branch's share of the input's gradient is added to `dx` (N, in), if there is one.
    """
    mask = da = db = None
    if key is not None:
        mask = dropout_mask(flat, rate=layer.dropout_rate, key=key)
        flat = flat * mask
    a_cast = a.to(g.dtype)
    g_b = g @ b.to(g.dtype).t()  # (tokens, r)
    if needed[0]:
        da = product_in_fp32(flat.t(), g_b).mul_(layer.scale)
    if needed[1]:
        db = product_in_fp32((flat @ a_cast).t(), g).mul_(layer.scale)
    if dx is not None:
        if mask is None:
            dx.addmm_(g_b, a_cast.t(), alpha=layer.scale)
        else:
            dx.addcmul_(g_b @ a_cast.t(), mask, value=layer.scale)
    return da, db


class _PackedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, layer: PackedLinear, key: int | None) -> Tensor:
        ctx.layer, ctx.key, ctx.input_shape = layer, key, x.shape
        ctx.save_for_backward(*((x, a, b) if a is not None else ()))
        if not layer.value_needed:
            return x.new_zeros(1).expand(*x.shape[:-1], layer.out_features)
        flat = x.reshape(-1, x.shape[-1])
        if layer.bias is None:
            y = flat @ layer.unpacked(x.dtype).t()
        else:
            y = torch.addmm(layer.bias, flat, layer.unpacked(x.dtype).t())
        add_lora(layer, flat, a, b, key, into=y)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, g = ctx.layer, grads[0].reshape(-1, grads[0].shape[-1])
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        dx = g @ layer.unpacked(g.dtype) if need_x else None
        da = db = None
        if ctx.saved_tensors:
            x, a, b = ctx.saved_tensors
            flat = x.reshape(-1, x.shape[-1])
            da, db = lora_gradients(layer, flat, a, b, g, key=ctx.key, dx=dx, needed=(need_a, need_b))
        return None if dx is None else dx.view(ctx.input_shape), da, db, None, None
