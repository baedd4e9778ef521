"""A row-wise module (a norm) run in tiles of tokens, whose graph keeps its input alone.

transformers' norms compute in fp32 and let autograd keep several fp32 copies of the hidden states: in bfloat16 these are
more bytes than all else in a layer. Here the module itself runs on one tile of rows at a time, and once more in the
backward to get the tile's gradient from autograd. Rows do not know each other, so values and gradients are bitwise those
of the module run whole. The module's own parameters are frozen and get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.plan.facts.device_kinds import kind_of


class TokenTiled(nn.Module):
    """A module that runs `inner`, which maps each row (last dimension) on its own, in tiles of rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the wrapped module."""
        return self.inner.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        """The wrapped module's output for x (..., D), bitwise; the graph keeps x alone."""
        y: Tensor = _TokenTiled.apply(x, self.inner)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return y


class _TokenTiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: nn.Module) -> Tensor:
        ctx.inner = inner
        ctx.save_for_backward(x)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows)
        for tile in _tiles(rows):
            y[tile] = inner(rows[tile])
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        dx = torch.empty_like(rows)
        for tile in _tiles(rows):
            dx[tile] = _tile_gradient(ctx.inner, rows[tile], g[tile])
        return dx.view(x.shape), None


def _tile_gradient(inner: nn.Module, rows: Tensor, g: Tensor) -> Tensor:
    leaf = rows.detach().requires_grad_()
    with torch.enable_grad():
        y = inner(leaf)
    return torch.autograd.grad(y, leaf, g)[0]


def _tiles(rows: Tensor) -> list[slice]:
    size = max(1, kind_of(rows.device.type).norm_tile_bytes // (rows.shape[1] * rows.element_size()))
    return [slice(start, start + size) for start in range(0, len(rows), size)]
