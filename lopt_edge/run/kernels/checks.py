"""Our own kernels, each run on a device and held against torch's functions in float64 on the CPU.

Shapes are those at which a kernel can go wrong: widths that fill no block, rows that lie apart in memory, a last chunk that
is short, targets at both ends of a chunk. They take less than a second where Triton has compiled the kernels before. A run
takes no kernel on a device on which one of them fails (choice.py); `lopt-edge doctor --prove` shows them one by one, in
every dtype; a test runs them by Triton's interpreter on a machine without a GPU (tests/run/kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from lopt_edge.run.kernels.operators import operators

# Relative, of one kernel: fp32 sums in another order; one rounding of a result, where torch may round after each call.
KERNEL_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EPSILON = 1e-6
N_TOKENS, N_ROWS, CHUNK = 6, 5000, 2200  # of the vocabulary: the last chunk is short


def kernel_checks(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield the name of each check, and what gives its largest relative error."""
    yield "norm of hidden states", partial(_norm, device, dtype, (5,), 4352)  # more than a program's usual numbers
    yield "norm of heads", partial(_norm, device, dtype, (2, 9, 3), 80)
    yield "rotary positions", partial(_rotary, device, dtype, 80)
    yield "gate", partial(_gate, device, dtype)
    yield "vocabulary", partial(_vocabulary, device, dtype, 1.0, 0.0)
    yield "vocabulary with factor and cap", partial(_vocabulary, device, dtype, 0.25, 3.0)


def relative(found: Tensor, exact: Tensor) -> float:
    """The error |found - exact| / |exact|; `exact` is in float64 on the CPU."""
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _worst(ours: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


def _norm(device: torch.device, dtype: torch.dtype, rows: tuple[int, ...], width: int) -> float:
    x, g = (_draw(*rows, width, dtype=dtype, seed=seed) for seed in (0, 2))
    weight = _draw(width, dtype=dtype, seed=1)
    leaf = x.double().requires_grad_()
    y = rms_norm(leaf, (width,), weight.double(), EPSILON)
    expected = [y.detach(), *torch.autograd.grad(y, leaf, g.double())]
    x, g, weight = (tensor.to(device) for tensor in (x, g, weight))
    backward = operators().rms_norm_backward(g, x, weight, EPSILON)
    return _worst([operators().rms_norm(x, weight, EPSILON), backward], expected)


def _rotary(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Two sequences with positions of their own; memory by token, as projections leave it."""
    x, g = (_draw(2, 7, 3, width, dtype=dtype, seed=seed).transpose(1, 2) for seed in (0, 1))
    cosines, sines = (_draw(2, 7, width, dtype=dtype, seed=seed) for seed in (2, 3))
    leaf = x.double().requires_grad_()
    first, second = leaf.chunk(2, dim=-1)
    y = leaf * cosines.double()[:, None] + torch.cat((-second, first), dim=-1) * sines.double()[:, None]
    expected = [y.detach(), *torch.autograd.grad(y, leaf, g.double())]
    tables = (cosines.to(device), sines.to(device))
    turned = [operators().rotate(each.to(device), *tables, back) for each, back in ((x, False), (g.contiguous(), True))]
    return _worst(turned, expected)


def _gate(device: torch.device, dtype: torch.dtype) -> float:
    """Halves of one tensor, whose rows lie apart."""
    both, d = _draw(9, 2 * 1100, dtype=dtype, seed=0), _draw(9, 1100, dtype=dtype, seed=1)
    leaves = [half.double().requires_grad_() for half in both.chunk(2, dim=1)]
    inner = silu(leaves[0]) * leaves[1]
    expected = [inner.detach(), *torch.autograd.grad(inner, leaves, d.double()), inner.detach()]
    once, again, d = both.to(device, copy=True), both.to(device, copy=True), d.to(device)
    operators().gate_(*once.chunk(2, dim=1))
    operators().gate_backward_(*again.chunk(2, dim=1), d)
    return _worst([once.chunk(2, dim=1)[0], *again.chunk(2, dim=1), d], expected)


def _vocabulary(device: torch.device, dtype: torch.dtype, factor: float, cap: float) -> float:
    """The softmax over chunks, times the cap's slopes; its sums; each target's score and slope."""
    raw = 4 * _draw(N_TOKENS, N_ROWS, dtype=dtype, seed=0)
    targets = torch.tensor([0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, N_ROWS - 1])
    scores = raw.double() * factor
    slopes = torch.ones_like(scores)
    if cap:
        slopes, scores = 1 - torch.tanh(scores / cap).square(), cap * torch.tanh(scores / cap)
    expected = [torch.softmax(scores, 1) * slopes, torch.logsumexp(scores, 1)]
    expected += [each.gather(1, targets.unsqueeze(1)).squeeze(1) for each in (scores, slopes)]
    carried = torch.zeros(5, N_TOKENS, device=device)
    carried[0], carried[3] = -torch.inf, 1.0
    whole = torch.zeros(N_TOKENS, 0, dtype=torch.float64)
    for start in range(0, N_ROWS, CHUNK):
        chunk = raw[:, start : start + CHUNK].to(device, copy=True)
        operators().vocabulary_chunk_(chunk, targets.to(device), carried, start, factor, cap, True)
        whole = torch.cat([whole * carried[4].cpu().double().unsqueeze(1), chunk.cpu().double()], dim=1)
    greatest, total, score, slope = (row.cpu().double() for row in carried[:4])
    return _worst([whole / total.unsqueeze(1), greatest + total.log(), score, slope], expected)
