"""A linear layer whose weight is a mixture of two others', W = a W1 + b W2, with learned a and b, and a LoRA branch.

It stores two numbers instead of a matrix. Blocks of rows of W1 and W2 are unpacked into the shared buffer, used for all
tokens and dropped, so what it takes beside its input and output does not grow with the tokens. With J rows at a time:

    forward    y_J = x (a W1_J + b W2_J)^T
    backward   D = g_J^T x, the gradient of W_J;   da += <D, W1_J>;   db += <D, W2_J>;   dx += g_J (a W1_J + b W2_J)

so the backward takes one more product than that of a plain frozen layer, and no more memory than one dense block. The LoRA
branch and dropout are quant/linear.py's. `fit` finds the a and b of least squares for a given W, from the same blocks.

The rule: both layers' weights are there (resident or fetched) while this one computes. It never changes them, and no
gradient reaches them.

Shapes: N tokens, J rows (output features) of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.linear import PackedLinear, add_lora, lora_gradients
from quant.packed import Packed
from quant.sizes import rows_at_once

SINGULAR = 1e-6  # of the larger eigenvalue: below it the two matrices count as one direction


@dataclass(frozen=True, eq=False)
class Mixture:
    """The weight a * before + b * after; `mix` (2,) fp32 is a and b."""

    before: PackedLinear
    after: PackedLinear
    mix: nn.Parameter

    def apply(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """The output (..., out) of `layer` for x (..., in). Raises RuntimeError if a neighbour's weight is not resident."""
        arguments = (x, layer.lora_a, layer.lora_b, self.mix, layer, layer.dropout_key())
        y: Tensor = _MixedFunction.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return y


class Rows:
    """A reader of several matrices of one shape, in blocks of rows, which are void after the next read."""

    def __init__(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> None:
        self.linears, self.dtype = linears, dtype
        self.weights = [_present(linear) for linear in linears]
        n_out, n_in = self.weights[0].shape
        packed = [weight for weight in self.weights if not isinstance(weight, Tensor)]
        cut = all(n_in % weight.block_elements == 0 for weight in packed)  # else matrices are unpacked whole
        self.at_once = rows_at_once(n_out, n_in) if cut else n_out
        self.cut = cut
        self.scales = [None if not cut or isinstance(weight, Tensor) else weight.scales() for weight in self.weights]

    def blocks(self) -> Iterator[slice]:
        """Yield the rows of each block, in order."""
        n_out = self.weights[0].shape[0]
        for start in range(0, n_out, self.at_once):
            yield slice(start, min(start + self.at_once, n_out))

    def read(self, rows: slice) -> tuple[Tensor, ...]:
        """The dequantised rows (J, in) of each matrix, in the shared buffer."""
        height, n_in = rows.stop - rows.start, self.weights[0].shape[1]
        device = self.weights[0].device
        flat = self.linears[0].buffer.view((len(self.weights) * height, n_in), self.dtype, device)
        blocks = flat.view(len(self.weights), height, n_in).unbind(0)
        for block, weight, scales in zip(blocks, self.weights, self.scales, strict=True):
            if isinstance(weight, Tensor):
                block.copy_(weight[rows])
            elif self.cut:
                weight.unpack_part(scales, block, rows=rows)
            else:
                weight.unpack_into(block)
        return blocks


def _present(linear: PackedLinear) -> Packed | Tensor:
    if linear.weight is None:
        raise RuntimeError("the weight that this layer's weight is made of is not resident")
    return linear.weight


class _MixedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, mix: Tensor, layer: PackedLinear, key: int | None
    ) -> Tensor:
        ctx.layer, ctx.key, ctx.has_lora = layer, key, a is not None
        ctx.save_for_backward(*((x, a, b) if a is not None else (x,)))
        if not layer.value_needed:
            return x.new_zeros(1).expand(*x.shape[:-1], layer.out_features)
        flat = x.reshape(-1, x.shape[-1])
        y = _product(layer, flat)
        add_lora(layer, flat, a, b, key, into=y)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, g = ctx.layer, grads[0].reshape(-1, grads[0].shape[-1])
        x, *lora = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        dx, dmix = _gradients(layer, flat, g)
        da = db = None
        if ctx.has_lora:
            needed = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
            a, b = lora
            da, db = lora_gradients(layer, flat, a, b, g, key=ctx.key, dx=dx, needed=needed)
        return dx.view(x.shape), da, db, dmix, None, None


def _product(layer: PackedLinear, flat: Tensor) -> Tensor:
    """The product x (a W1 + b W2)^T, plus the bias: (N, out)."""
    mixture = _mixture(layer)
    (a, b), rows = mixture.mix.cpu().tolist(), Rows((mixture.before, mixture.after), flat.dtype)
    y = flat.new_empty(len(flat), layer.out_features)
    for block in rows.blocks():
        first, second = rows.read(block)
        torch.mm(flat, first.mul_(a).add_(second, alpha=b).t(), out=y[:, block])
    return y if layer.bias is None else y.add_(layer.bias)


def _gradients(layer: PackedLinear, flat: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients dx (N, in), without LoRA's share, and (da, db) (2,) fp32."""
    mixture = _mixture(layer)
    (a, b), rows = (
        mixture.mix.cpu().tolist(),
        Rows((mixture.before, mixture.after), g.dtype),
    )  # a GPU's host waits
    dx, dmix = torch.empty_like(flat), torch.zeros(2, dtype=torch.float32, device=g.device)
    for block in rows.blocks():
        _add_block((a, b), rows.read(block), flat, g[:, block], dx=dx, dmix=dmix, first=block.start == 0)
    return dx, dmix


def _add_block(
    mix: tuple[float, float], weights: tuple[Tensor, ...], flat: Tensor, g: Tensor, *, dx: Tensor, dmix: Tensor, first: bool
) -> None:
    """Add a block's share to the gradients; in a function of its own, so that nothing lives on into the next block."""
    (a, b), (before, after) = mix, weights
    gradient = g.t() @ flat  # (J, in)
    dmix[0] += _inner(gradient, before)
    dmix[1] += _inner(gradient, after)
    del gradient
    mixed = before.mul_(a).add_(after, alpha=b)
    if first:
        torch.mm(g, mixed, out=dx)
    else:
        dx.addmm_(g, mixed)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """The inner product <left, right> of two matrices in fp32, a scalar tensor."""
    if left.dtype == torch.float32:
        return torch.dot(left.view(-1), right.reshape(-1))
    return left.float().mul_(right).sum()


def _mixture(layer: PackedLinear) -> Mixture:
    assert isinstance(layer.synthesis, Mixture)
    return layer.synthesis


@torch.no_grad()
def fit(own: PackedLinear, before: PackedLinear, after: PackedLinear) -> tuple[float, float, float]:
    """The a and b of the least |W - a W1 - b W2|, and the share |W - a W1 - b W2| / |W| that they leave.

    They are computed from the products of the three dequantised matrices, taken block by block. Where W1 and W2 are
    (nearly) one direction the shortest (a, b) is taken.
    """
    rows, products = Rows((own, before, after), torch.float32), torch.zeros(3, 3, dtype=torch.float64)
    for block in rows.blocks():
        flat = [part.view(-1) for part in rows.read(block)]
        products += torch.stack([torch.dot(left, right) for left in flat for right in flat]).view(3, 3).double().cpu()
    gram, right = products[1:, 1:], products[1:, 0]
    found = torch.linalg.pinv(gram, rtol=SINGULAR, hermitian=True) @ right
    left = products[0, 0] - 2 * found @ right + found @ gram @ found
    unexplained = (left.clamp(min=0) / products[0, 0].clamp(min=1e-300)).sqrt().item()
    return found[0].item(), found[1].item(), unexplained
