"""What lies between the products of a gated MLP, silu(gate) * up, in one kernel each way, in the place of what it is given.

Forward: gate becomes silu(gate) up. Backward, with d the gradient of that product: gate becomes its own gradient, up its
own, and d the product, which the last matrix' adapter needs. So no tensor is made: the backward of a piece of the MLP holds
three tensors of (tokens x features), where torch's calls hold six.

    a = g s,  s = sigmoid(g);   inner = a u,  dg = d u s (1 + g (1 - s)),  du = d a
Computed in fp32 and rounded once. Rows may lie apart (halves of a joined product), their numbers together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program


@triton.jit
def forward_kernel(gate, up, n_columns, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    gates = gate + row * gate_row + columns
    g = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(gates, (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(gate, up, d, n_columns, gate_row, up_row, d_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    gates, ups, slopes = gate + row * gate_row + columns, up + row * up_row + columns, d + row * d_row + columns
    g = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(slopes, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    active = g * share
    tl.store(gates, (slope * u * share * (1.0 + g * (1.0 - share))).to(gate.dtype.element_ty), mask=inside)
    tl.store(ups, (slope * active).to(up.dtype.element_ty), mask=inside)
    tl.store(slopes, (active * u).to(d.dtype.element_ty), mask=inside)


def gate_(gate: Tensor, up: Tensor) -> None:
    """Let gate (N, J) become silu(gate) * up."""
    n_rows, n_columns = gate.shape
    if gate.numel():
        grid, rows = (n_rows, triton.cdiv(n_columns, BLOCK)), [tensor.stride(0) for tensor in (gate, up)]
        forward_kernel[grid](gate, up, n_columns, *rows, BLOCK, enable_fp_fusion=True)


def gate_backward_(gate: Tensor, up: Tensor, d: Tensor) -> None:
    """Let gate and up (N, J) become their gradients, and `d`, the gradient of their gated product, that product."""
    n_rows, n_columns = gate.shape
    if gate.numel():
        grid, rows = (n_rows, triton.cdiv(n_columns, BLOCK)), [tensor.stride(0) for tensor in (gate, up, d)]
        backward_kernel[grid](gate, up, d, n_columns, *rows, BLOCK, enable_fp_fusion=True)
