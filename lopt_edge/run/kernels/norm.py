"""An RMSNorm in one kernel each way, for rows that lie one after the other.

It rounds where transformers' module does: the normed row to the dtype, then the product with the weight. The backward makes
the row's reciprocal root mean square again, so that the graph keeps the input alone and nothing else is written:
    y = w x r,  r = 1 / sqrt(mean(x^2) + eps);   dx = r (w g - x r mean(w g x r))
Sums are in fp32. The weight gets no gradient: norms are frozen.

A program takes as many rows as make some 4,096 numbers, so that heads (128 wide) fill it as hidden states do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a program


@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(x, weight, y, n_rows, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < n_rows) & (columns[None, :] < WIDTH)
    at = rows[:, None] * WIDTH + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    reciprocal = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / WIDTH + epsilon)
    normed = (values * reciprocal[:, None]).to(y.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + at, (normed * scale[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def backward_kernel(
    g,
    x,
    weight,
    dx,
    n_rows,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < n_rows) & (columns[None, :] < WIDTH)
    at = rows[:, None] * WIDTH + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    slopes = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    reciprocal = (1.0 / tl.sqrt(tl.sum(values * values, axis=1) / WIDTH + epsilon))[:, None]
    normed = values * reciprocal
    weighted = slopes * scale[None, :]
    shared = (tl.sum(weighted * normed, axis=1) / WIDTH)[:, None]
    tl.store(dx + at, (reciprocal * (weighted - normed * shared)).to(dx.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of the last dimension of a contiguous tensor."""
    y = torch.empty_like(x)
    _launch(forward_kernel, x, weight, y, epsilon=epsilon)
    return y


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The gradient of the norm's input; `g` and `x` are contiguous."""
    dx = torch.empty_like(x)
    _launch(backward_kernel, g, x, weight, dx, epsilon=epsilon)
    return dx


def _launch(kernel: Any, *tensors: Tensor, epsilon: float) -> None:
    width = tensors[0].shape[-1]
    n_rows, block = tensors[0].numel() // width, triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    warps = 4 if block <= ELEMENTS else 8
    if n_rows:
        kernel[(triton.cdiv(n_rows, rows),)](
            *tensors, n_rows, epsilon, width, block, rows, num_warps=warps, enable_fp_fusion=True
        )
