"""A row-wise module (a norm) run in tiles of tokens, whose graph keeps its input alone.

transformers' norms compute in fp32 and let autograd keep several fp32 copies of the hidden states: in bfloat16 these are
more bytes than all else in a layer. Here the module itself runs on one tile of rows at a time, and once more in the
backward to get the tile's gradient from autograd. Rows do not know each other, so values and gradients are bitwise those
of the module run whole. The module's own parameters are frozen and get no gradient.

Where torch has one kernel for the norm (on CUDA, for a plain RMSNorm) that takes the place of the module's own eight: it
rounds once where the module rounds before it multiplies by the weight. The backward runs it again for its row sums, so
that the graph keeps no more than elsewhere. Our own kernel (run/kernels/norm.py) needs neither tiles nor row sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.plan.facts.device_kinds import TORCH, TRITON, kind_of
from lopt_edge.run.kernels.operators import operators


class TokenTiled(nn.Module):
    """A module that runs `inner`, which maps each row (last dimension) on its own, in tiles of rows.

    `is_plain`: it is an RMSNorm that multiplies by its weight and does nothing else; such a one may run by our `kernels`.
    """

    def __init__(self, inner: nn.Module, *, is_plain: bool = False, kernels: str = TORCH) -> None:
        super().__init__()
        self.inner, self.is_plain, self.kernels = inner, is_plain, kernels

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the wrapped module."""
        return self.inner.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        """The wrapped module's output for x (..., D), bitwise where it runs itself; the graph keeps x alone."""
        function: type[torch.autograd.Function] = _TokenTiled
        if self.is_plain and self.kernels == TRITON:
            function = _OwnNorm
        elif self.is_plain and kind_of(x.device.type).fuses_norms and not x.is_cpu:
            function = _FusedNorm
        y: Tensor = function.apply(x, self.inner)  # type: ignore[no-untyped-call]  # torch's apply has no types
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


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: nn.Module) -> Tensor:
        ctx.inner = inner
        ctx.save_for_backward(x)
        rows = x.reshape(-1, x.shape[-1])
        return _in_tiles(rows, lambda tile: _normed(inner, rows[tile])[0]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        return _in_tiles(rows, lambda tile: _normed_gradient(ctx.inner, rows[tile], g[tile])).view(x.shape), None


class _OwnNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: nn.Module) -> Tensor:
        ctx.inner = inner
        ctx.save_for_backward(x)
        y: Tensor = operators().rms_norm(x.contiguous(), inner.get_parameter("weight"), _epsilon(inner))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        weight = ctx.inner.get_parameter("weight")
        backward = operators().rms_norm_backward
        return backward(grads[0].contiguous(), x.contiguous(), weight, _epsilon(ctx.inner)), None


def _in_tiles(rows: Tensor, work: Callable[[slice], Tensor]) -> Tensor:
    """What `work` gives for each tile, in one tensor; of one tile alone nothing is copied."""
    tiles = _tiles(rows)
    if len(tiles) == 1:
        return work(tiles[0])
    whole = torch.empty_like(rows)
    for tile in tiles:
        whole[tile] = work(tile)
    return whole


def _normed(inner: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of rows, and the reciprocal of each row's root mean square in fp32."""
    weight, width = inner.get_parameter("weight"), [rows.shape[-1]]
    found: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm(rows, width, weight, _epsilon(inner))
    return found


def _normed_gradient(inner: nn.Module, rows: Tensor, g: Tensor) -> Tensor:
    reciprocals = _normed(inner, rows)[1]
    weight, width = inner.get_parameter("weight"), [rows.shape[-1]]
    wanted = [True, False]  # of the rows, not of the weight
    found: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm_backward(g, rows, width, reciprocals, weight, wanted)
    return found[0]


def _epsilon(inner: nn.Module) -> float:
    """The number that keeps a norm from dividing by zero, under the names that families give it."""
    return next(float(vars(inner)[name]) for name in ("variance_epsilon", "eps") if name in vars(inner))


def _tiles(rows: Tensor) -> list[slice]:
    size = max(1, kind_of(rows.device.type).norm_tile_bytes // (rows.shape[1] * rows.element_size()))
    return [slice(start, start + size) for start in range(0, len(rows), size)]
