"""Experts on packed weights: each token goes through a few of many gated MLPs, y = sum of w_e (gate(x G_e^T) D_e^T).
Where a family adds biases to the two products, they are resident.

Which tokens go where, and with which weight, is decided outside (the family's own router). The experts that a micro-batch
goes to are unpacked one after the other into the shared buffer, each once a pass; the others are not touched. The tokens
of an expert are gathered in tiles, so that what lives at a time is a tile's worth even if all tokens go to one expert.

The graph keeps x, the experts' numbers and their weights. The backward unpacks again, computes a tile's intermediate again
(the gate by autograd, the products by hand), and gives the gradients of x and of the weights; the experts themselves are
frozen. When a layer is recomputed only for its backward (`value_needed = False`) the forward computes nothing.
The rule: values are those of transformers' own loop over experts, bit by bit, whatever its order of experts sums up; the
gradient of x is summed in fp32.

Shapes: N tokens, P experts that a token goes to, D hidden, I features inside an expert, M rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quant.linear import UnpackBuffer
from quant.packed import Packed
from quant.sizes import expert_tile

Gate = Callable[[Tensor], Tensor]  # (M, 2 I) -> (M, I)


@dataclass(eq=False)
class ExpertMatrix:
    """The place of one matrix (out, in) of an expert; `weight` is there while its layer is resident."""

    shape: tuple[int, int]
    weight: Packed | Tensor | None = None


class Expert(NamedTuple):
    """An expert while it computes: its matrices (2 I, D) and (D, I), and what is added to their products."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class PackedExperts(nn.Module):
    """The experts of a layer, called as transformers calls its own. `matrices`: of each expert the matrices that read the
    hidden states, whose outputs stand side by side for `gate`, and last the one that writes them. `biases`: those of both
    products by name, (experts, features) each, or none."""

    def __init__(
        self,
        matrices: Sequence[Sequence[ExpertMatrix]],
        *,
        gate: Gate,
        buffer: UnpackBuffer,
        biases: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.matrices, self.gate, self.buffer = matrices, gate, buffer
        self.value_needed, self.bias_names = True, tuple(biases or ())
        for name, bias in (biases or {}).items():
            self.register_parameter(name, bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The output (N, D) for x (N, D), the experts' numbers (N, P) and weights (N, P).

        Raises RuntimeError if a weight is not resident.
        """
        y: Tensor = _Experts.apply(hidden_states, top_k_index, top_k_weights, self)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return y

    def unpacked(self, expert: int, like: Tensor) -> Expert:
        """An expert whose matrices are in the shared buffer, in the dtype and on the device of `like`."""
        matrices = self.matrices[expert]
        flat = self.buffer.view((1, sum(prod(matrix.shape) for matrix in matrices)), like.dtype, like.device)[0]
        start = 0
        for matrix in matrices:
            _unpack(matrix, flat[start : start + prod(matrix.shape)].view(matrix.shape))
            start += prod(matrix.shape)
        down = matrices[-1].shape
        biases = (self.get_parameter(name)[expert] for name in self.bias_names)
        return Expert(flat[: start - prod(down)].view(-1, down[0]), flat[start - prod(down) : start].view(down), *biases)


def _unpack(matrix: ExpertMatrix, out: Tensor) -> None:
    if matrix.weight is None:
        raise RuntimeError("the weights of this layer's experts are not resident")
    if isinstance(matrix.weight, Tensor):
        out.copy_(matrix.weight)
    else:
        matrix.weight.unpack_into(out)


def routed(index_NP: Tensor, n_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that tokens go to, and where: positions in the flat (P, N), in their order, a tile at a time."""
    size = expert_tile(on_cpu=index_NP.is_cpu)
    numbers, order = torch.sort(index_NP.t().reshape(-1), stable=True)
    counts = torch.bincount(numbers, minlength=n_experts).tolist()
    del numbers
    start = 0
    for expert, n_rows in enumerate(counts):
        for first in range(start, start + n_rows, size):
            yield expert, order[first : min(first + size, start + n_rows)]
        start += n_rows


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, experts: PackedExperts) -> Tensor:
        ctx.experts = experts
        ctx.save_for_backward(x, index, weights)
        if not experts.value_needed:
            return x.new_zeros(1).expand(x.shape)
        return _forward(experts, x, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, index, weights = ctx.saved_tensors
        dx, d_weights = _backward(ctx.experts, x, index, weights, grads[0])
        return dx.to(x.dtype), None, d_weights, None


def _forward(experts: PackedExperts, x_ND: Tensor, index_NP: Tensor, weights_NP: Tensor) -> Tensor:
    y_ND, last = torch.zeros_like(x_ND), -1
    for expert, places in routed(index_NP, len(experts.matrices)):
        if expert != last:
            unpacked, last = experts.unpacked(expert, x_ND), expert
        forward_tile(experts.gate, unpacked, (x_ND, weights_NP), places, y_ND=y_ND)
    return y_ND


def forward_tile(gate: Gate, expert: Expert, inputs: tuple[Tensor, Tensor], places_M: Tensor, *, y_ND: Tensor) -> None:
    """Add what an expert gives for some tokens to `y_ND`; in a function of its own, so that nothing lives on."""
    x_ND, weights_NP = inputs
    token_M, choice_M = places_M % len(x_ND), places_M // len(x_ND)
    inner_MI = gate(_product(x_ND[token_M], expert.gate_up, expert.gate_up_bias))
    out_MD = _product(inner_MI, expert.down, expert.down_bias).mul_(weights_NP[token_M, choice_M].unsqueeze(1))
    y_ND.index_add_(0, token_M, out_MD)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; the sum is rounded by itself, as transformers' is."""
    y = x @ matrix.t()
    return y if bias is None else y.add_(bias)


@dataclass(frozen=True, eq=False)
class ExpertGradients:
    """What the backward adds up: the gradients of x, in fp32, and of the experts' weights."""

    dx_ND: Tensor
    d_weights_NP: Tensor


def _backward(
    experts: PackedExperts, x_ND: Tensor, index_NP: Tensor, weights_NP: Tensor, g_ND: Tensor
) -> tuple[Tensor, Tensor]:
    sums = ExpertGradients(torch.zeros_like(x_ND, dtype=torch.float32), torch.zeros_like(weights_NP))
    last = -1
    for expert, places in routed(index_NP, len(experts.matrices)):
        if expert != last:
            unpacked, last = experts.unpacked(expert, x_ND), expert
        backward_tile(experts.gate, unpacked, (x_ND, weights_NP, g_ND), places, sums=sums)
    return sums.dx_ND, sums.d_weights_NP


def backward_tile(
    gate: Gate,
    expert: Expert,
    inputs: tuple[Tensor, Tensor, Tensor],
    places_M: Tensor,
    *,
    sums: ExpertGradients,
) -> None:
    """Add the gradients of some tokens of an expert to `sums`. <g, y> is <g D, inner> + <g, b>: y is not computed again."""
    x_ND, weights_NP, g_ND = inputs
    token_M, choice_M = places_M % len(x_ND), places_M // len(x_ND)
    with torch.enable_grad():
        leaf_MJ = _product(x_ND[token_M], expert.gate_up, expert.gate_up_bias).detach().requires_grad_()
        inner_MI = gate(leaf_MJ)
    d_inner_MI = g_ND[token_M] @ expert.down
    d_weight_M = (d_inner_MI * inner_MI.detach()).sum(dim=1)
    if expert.down_bias is not None:
        d_weight_M += g_ND[token_M] @ expert.down_bias
    d_weight_M = d_weight_M.to(weights_NP.dtype)
    sums.d_weights_NP[token_M, choice_M] = d_weight_M
    del d_weight_M
    d_inner_MI.mul_(weights_NP[token_M, choice_M].unsqueeze(1))
    (d_MJ,) = torch.autograd.grad(inner_MI, leaf_MJ, d_inner_MI)
    del inner_MI, leaf_MJ, d_inner_MI
    sums.dx_ND.index_add_(0, token_M, (d_MJ @ expert.gate_up).to(torch.float32))
