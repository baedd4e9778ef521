"""`lopt-edge doctor --prove`: the parts that a device could get wrong, each run there and held against float64 on the CPU.

For the first minutes on a card nobody has run on: attention by each kernel that the device takes, whole and a few heads at
a time; a norm; our own kernels where a run would take them (run/kernels/checks.py); the MLP on 4-bit weights, whole and in
blocks, the last one of one quantisation block; movements to every tier and back while the device computes; pinning beyond
its limit; and a budget that must refuse. Inputs are drawn from fixed seeds. A proof never raises: what it met is its
`fault`. Together they take seconds on a GPU.

Then whole tiny models (prove_models.py) and whole runs (prove_runs.py). The rule: nothing begins after `MOST_SECONDS`; what
was left out is told as such, and is no proof. Speed is not looked at: that is `--measure`, and the benches in tools/.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from lopt_edge.doctor.layer_check import BOUNDS, exact_weight, one_line
from lopt_edge.doctor.prove_models import model_proofs
from lopt_edge.doctor.prove_runs import run_proofs
from lopt_edge.plan.costs.tiles import EFFICIENT, FLASH
from lopt_edge.run.device import DTYPES, device_of
from lopt_edge.run.devices.interface import Device
from lopt_edge.run.kernels.checks import KERNEL_BOUNDS, kernel_checks, relative
from lopt_edge.run.kernels.choice import why_not
from lopt_edge.run.model.fused_attention import KERNELS, fused
from lopt_edge.run.model.tiled import TokenTiled
from lopt_edge.run.step.op_faults import is_out_of_memory
from lopt_edge.run.tiers.moves import Mover, OffloadedTensor
from lopt_edge.run.tiers.page_file import PageFile
from lopt_edge.run.tiers.pinned import PinnedPool
from quant.gated_mlp import PackedGatedMLP
from quant.linear import PackedLinear, UnpackBuffer
from quant.nf4 import pack
from quant.sizes import PIECES, MlpPieces

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 300, 8, 2, 64
HIDDEN, INTERMEDIATE, RANK, SCALE = 128, 1088, 8, 2.0  # the last block has 64 features
ROUNDS, MOVED_ELEMENTS = 20, 1 << 18
MIB = 1 << 20
MOST_SECONDS = 480.0  # in which proofs begin: the last one to begin may be three children


@dataclass(frozen=True)
class Proof:
    """One proof: the largest relative error found and its bound (0 of 0 where bits or refusals are compared)."""

    name: str
    error: float
    bound: float
    seconds: float
    fault: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was raised, and the error (no NaN) is within its bound."""
        return self.fault is None and self.error <= self.bound


def prove(device: torch.device, *, most_seconds: float = MOST_SECONDS) -> Iterator[Proof]:
    """Yield each proof on a device as it ends."""
    own, began = device_of(device), time.monotonic()
    with own.made_current():
        for name, bound, work in _all(own):
            started, error, fault = time.monotonic(), 0.0, None
            if started - began > most_seconds:
                yield Proof(name, error, bound, 0.0, f"left out: {most_seconds:.0f} s are over")
                continue
            try:
                error = work()
            except Exception as raised:  # whatever a driver or a kernel may raise
                fault = one_line(raised)
            yield Proof(name, error, bound, time.monotonic() - started, fault)


def _all(own: Device) -> Iterator[tuple[str, float, Callable[[], float]]]:
    for name in own.dtype_names():
        dtype, bound = DTYPES[name], BOUNDS[name]
        for kernel in _kernels(own, dtype):
            yield f"attention, {kernel or 'torch'}, {name}", bound, partial(_attention, own, dtype, kernel)
        yield f"norm, {name}", bound, partial(_norm, own, dtype)
        for what, work in kernel_checks(own.device, dtype) if why_not(own.device) is None else ():
            yield f"own kernels, {what}, {name}", KERNEL_BOUNDS[dtype], work
        for words, features in (("blocked", PIECES.features), ("whole", INTERMEDIATE)):
            pieces = MlpPieces(features, joined=own.kind.joins_products)
            yield f"{words} MLP on 4 bits, {name}", bound, partial(_mlp, own, dtype, pieces)
    for tier in ("host", "disk") if own.kind.host_is_below else ("disk",):
        yield f"movements to {tier} and back", 0.0, partial(_movements, own, tier)
    if own.kind.host_is_below:
        yield "pinning beyond its limit", 0.0, partial(_pinning, own)
    yield "a budget that refuses", 0.0, partial(_budget, own)
    yield from model_proofs(own)
    yield from run_proofs(own)


def _kernels(own: Device, dtype: torch.dtype) -> tuple[str | None, ...]:
    """The kernels of attention that the device takes; None: the one that torch chooses."""
    first = own.attention_kernel(dtype, HEAD_DIM)
    return (first,) if first is None else (FLASH, EFFICIENT) if first == FLASH else (first,)


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers that the dtype holds exactly, in float64: both sides start from the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).double()


def _attention(own: Device, dtype: torch.dtype, kernel: str | None) -> float:
    shapes = [(2, heads, TOKENS, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    exact = [_draw(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    gradient = _draw(2, TOKENS, HEADS, HEAD_DIM, dtype=dtype, seed=9)
    out = _torchs_own(exact)
    expected = [out.detach(), *torch.autograd.grad(out, exact, gradient)]
    worst = 0.0
    for at_once in (None,) if kernel is None else (None, 1):
        leaves = [tensor.detach().to(own.device, dtype).requires_grad_() for tensor in exact]
        if kernel is None:
            found = _torchs_own(leaves)
        else:
            found = fused(leaves[0], leaves[1], leaves[2], KERNELS[kernel], at_once=at_once)
        ours = [found.detach(), *torch.autograd.grad(found, leaves, gradient.to(own.device, dtype))]
        worst = max(worst, *(relative(mine, theirs) for mine, theirs in zip(ours, expected, strict=True)))
    return worst


def _torchs_own(inputs: list[Tensor]) -> Tensor:
    query, key, value = inputs
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


class _RMSNorm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(x.dtype)


def _norm(own: Device, dtype: torch.dtype) -> float:
    x, weight, gradient = (_draw(*shape, dtype=dtype, seed=30) for shape in ((TOKENS, HIDDEN), (HIDDEN,), (TOKENS, HIDDEN)))
    y = torch.nn.functional.rms_norm(x.requires_grad_(), (HIDDEN,), weight, 1e-6)
    expected = [y.detach(), *torch.autograd.grad(y, x, gradient)]
    leaf = x.detach().to(own.device, dtype).requires_grad_()
    found = TokenTiled(_RMSNorm(weight.to(own.device, dtype)), is_plain=True)(leaf)
    ours = [found.detach(), *torch.autograd.grad(found, leaf, gradient.to(own.device, dtype))]
    return max(relative(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


def _mlp(own: Device, dtype: torch.dtype, pieces: MlpPieces) -> float:
    sizes, buffer = ((HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)), UnpackBuffer()
    linears, exact_weights, exact_adapters = [], [], []
    for seed, (n_in, n_out) in enumerate(sizes):
        linear = PackedLinear(n_in, n_out, buffer=buffer)
        packed = pack((_draw(n_out, n_in, dtype=dtype, seed=seed) * n_in**-0.5).float().to(own.device))
        linear.weight = packed
        a, b = (0.1 * _draw(*shape, dtype=dtype, seed=10 + seed) for shape in ((n_in, RANK), (RANK, n_out)))
        linear.attach(*(nn.Parameter(matrix.float().to(own.device)) for matrix in (a, b)), scale=SCALE)
        linears.append(linear)
        exact_weights.append(exact_weight(packed))
        exact_adapters.append([matrix.requires_grad_() for matrix in (a, b)])
    x = _draw(TOKENS, HIDDEN, dtype=dtype, seed=20).requires_grad_()
    gradient = _draw(TOKENS, HIDDEN, dtype=dtype, seed=21)

    def project(which: int, value: Tensor) -> Tensor:
        a, b = exact_adapters[which]
        return value @ exact_weights[which].T + SCALE * (value @ a) @ b

    y = project(2, silu(project(0, x)) * project(1, x))
    leaves = [x, *(matrix for pair in exact_adapters for matrix in pair)]
    expected = [y.detach(), *torch.autograd.grad(y, leaves, gradient)]
    leaf = x.detach().to(own.device, dtype).requires_grad_()
    found = PackedGatedMLP(linears[0], linears[1], linears[2], silu, pieces=pieces)(leaf)
    ours = [leaf, *(matrix for one in linears for matrix in (one.lora_a, one.lora_b) if matrix is not None)]
    gradients = torch.autograd.grad(found, ours, gradient.to(own.device, dtype))
    return max(relative(mine, theirs) for mine, theirs in zip([found, *gradients], expected, strict=True))


def _movements(own: Device, tier: str) -> float:
    """The share of rounds in which a tensor came back with other bits, while the device computed into freed memory."""
    generator, wrong = torch.Generator().manual_seed(1), 0
    with tempfile.TemporaryDirectory(prefix="lopt-edge-prove-") as folder:
        mover = Mover(own.device, page_file=PageFile(Path(folder), n_bytes=8 * MIB, name="prove"))
        try:
            for _ in range(ROUNDS):
                values = torch.randn(MOVED_ELEMENTS, generator=generator)
                offloaded = OffloadedTensor(values.to(own.device))
                mover.down(offloaded, tier)
                mover.wait(offloaded)
                # what was freed is written over
                scribble = [torch.full((MOVED_ELEMENTS,), float(n), device=own.device) for n in range(3)]
                mover.up(offloaded)
                mover.wait(offloaded)
                del scribble
                wrong += not torch.equal(offloaded.here().cpu(), values)
                mover.free(offloaded)
        finally:
            mover.close()
    return wrong / ROUNDS


def _pinning(own: Device) -> float:
    """1 if a block beyond the limit spoils a copy, or leaves an error for the next kernel."""
    pool = PinnedPool(own.device, limit_bytes=MIB)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blocks = [pool.take(MIB // 2), pool.take(8 * MIB)]
        for number, block in enumerate(blocks, start=1):
            block.copy_(torch.full((block.nbytes,), number, dtype=torch.uint8, device=own.device), non_blocking=True)
        own.synchronize()
        return float(not all(bool((block == number).all()) for number, block in enumerate(blocks, start=1)))
    finally:
        pool.close()


def _budget(own: Device) -> float:
    """1 if memory beyond a budget is given, or if what refuses it is not told from other faults."""
    beyond, room = 1024 * MIB, 256 * MIB
    wall = own.limit(own.taken_bytes() + room, context_bytes=0)
    try:
        torch.empty(beyond, dtype=torch.uint8, device=own.device).fill_(1)
    except Exception as error:
        return float(not is_out_of_memory(error))
    finally:
        wall.lift()
    return 1.0
