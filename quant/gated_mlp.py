"""A gated MLP on packed weights, y = (act(x G^T) * (x U^T)) D^T with LoRA on each, whose intermediate never exists whole.

It runs in blocks of J intermediate features: J rows of G and U and the same J columns of D are unpacked, used for all
tokens (in tiles of tokens), and dropped. So each weight is unpacked once a pass, into a buffer of J rows instead of the
whole matrix, and no tensor of (tokens x intermediate) is made. Blocks of features instead of tiles of tokens alone, because
a tile of tokens would need all three whole matrices unpacked, or unpacked again for every tile. How large the pieces are
(`MlpPieces`) is a memory setting: on a GPU one block of all features has the fewest kernels, and sums nothing up.

The graph keeps x alone. The backward runs the blocks again and computes all gradients by hand; when a layer is recomputed
only for its backward (`value_needed = False`) the forward computes nothing. y and dx are sums over blocks, taken in fp32
(quant/products.py): equal to the plain product up to the rounding of J-wise partial sums, and always the same for the same
input and the same pieces.
With dropout on the LoRA inputs, or where a weight is made of other layers' (quant/mixed.py), the plain layers are used
instead, whole intermediate and all.

Shapes: N tokens, D hidden, J features of a block, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quant.linear import PackedLinear
from quant.packed import Packed
from quant.products import add_product
from quant.sizes import PIECES, MlpPieces

Activation = Callable[[Tensor], Tensor]


class Gating(Protocol):
    """act(gate) * up and its backward by kernels that write to what they are given, and make no tensor."""

    def forward_(self, gate_NJ: Tensor, up_NJ: Tensor) -> None:
        """Let gate become act(gate) * up."""

    def backward_(self, gate_NJ: Tensor, up_NJ: Tensor, d_inner_NJ: Tensor) -> None:
        """Let gate and up become their gradients, and `d_inner`, the gradient of act(gate) * up, that product."""


class PackedGatedMLP(nn.Module):
    """A gated MLP in the place of a layer's own; its linears stay reachable under the names of the family's module."""

    def __init__(
        self,
        gate_proj: PackedLinear,
        up_proj: PackedLinear,
        down_proj: PackedLinear,
        act_fn: Activation,
        *,
        pieces: MlpPieces = PIECES,
        gating: Gating | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn
        self.pieces, self.gating = pieces, gating

    def forward(self, x: Tensor) -> Tensor:
        """The output (..., D) for x (..., D). Raises RuntimeError if a weight is not resident."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        if any(linear.dropout_key() is not None or linear.synthesis is not None for linear in linears):
            plain: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return plain
        adapters = [matrix for linear in linears for matrix in (linear.lora_a, linear.lora_b)]
        y: Tensor = _GatedMLPFunction.apply(x, self, *adapters)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return y


def blocks_fit(n_columns: int, block_elements: int, features: int) -> bool:
    """Whether rows and columns can be cut from a packed matrix, blocks of `features` columns: at every cut a quantisation
    block must end."""
    return n_columns % block_elements == 0 and features % block_elements == 0


class _Pass:
    """One run over the blocks: scales unpacked once, the LoRA inputs of gate and up computed once."""

    def __init__(self, mlp: PackedGatedMLP, x_ND: Tensor) -> None:
        self.mlp, self.x_ND = mlp, x_ND
        self.linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.packed = [_resident(linear) for linear in self.linears]
        self.scales = [weight.scales() for weight in self.packed]
        self.lora = [
            None if a is None or b is None else (a.to(x_ND.dtype), b.to(x_ND.dtype))
            for a, b in ((linear.lora_a, linear.lora_b) for linear in self.linears)
        ]
        self.low_NR = [None if pair is None else x_ND @ pair[0] for pair in self.lora[:2]]

    @property
    def is_whole(self) -> bool:
        """Whether one block has all features, so that nothing is summed over blocks."""
        return self.mlp.pieces.features >= self.mlp.gate_proj.out_features

    def blocks(self) -> Iterator[slice]:
        n_features, size = self.mlp.gate_proj.out_features, self.mlp.pieces.features
        for start in range(0, n_features, size):
            yield slice(start, min(start + size, n_features))

    def tiles(self) -> Iterator[slice]:
        size = self.mlp.pieces.tokens
        for start in range(0, len(self.x_ND), size):
            yield slice(start, start + size)

    def weights(self, block: slice) -> tuple[Tensor, Tensor]:
        """The matrices [G; U] (2 J, D) and D (D, J) of a block, in one shared buffer."""
        width, hidden = block.stop - block.start, self.x_ND.shape[1]
        out = self.mlp.down_proj.out_features
        flat = self.mlp.gate_proj.buffer.view((1, width * (2 * hidden + out)), self.x_ND.dtype, self.x_ND.device)[0]
        gate_up = flat[: 2 * width * hidden].view(2 * width, hidden)
        down = flat[2 * width * hidden :].view(out, width)
        for target, packed, scales in zip(gate_up.chunk(2), self.packed, self.scales, strict=False):
            packed.unpack_part(scales, target, rows=block)
        self.packed[2].unpack_part(self.scales[2], down, columns=block)
        return gate_up, down

    def project(self, which: int, tile: slice, gate_up: Tensor, block: slice) -> Tensor:
        """The product x G^T (`which` 0) or x U^T (1) of a tile and block, with LoRA and bias: (tile, J)."""
        return self._completed(which, tile, block, self.x_ND[tile] @ gate_up.chunk(2)[which].t())

    def project_both(self, tile: slice, gate_up: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """Both products of a tile and block; if they are joined, as halves of one tensor."""
        if not self.mlp.pieces.joined:
            return self.project(0, tile, gate_up, block), self.project(1, tile, gate_up, block)
        gate_NJ, up_NJ = (self.x_ND[tile] @ gate_up.t()).chunk(2, dim=1)
        return self._completed(0, tile, block, gate_NJ), self._completed(1, tile, block, up_NJ)

    def _completed(self, which: int, tile: slice, block: slice, y: Tensor) -> Tensor:
        """A product with the bias and LoRA branch of its linear layer added in its place."""
        linear, pair, low_NR = self.linears[which], self.lora[which], self.low_NR[which]
        if linear.bias is not None:
            y += linear.bias[block]
        if pair is not None and low_NR is not None:
            y.addmm_(low_NR[tile], pair[1][:, block], alpha=linear.scale)
        return y

    def inner(self, tile: slice, gate_up: Tensor, block: slice) -> Tensor:
        """The intermediate act(gate) * up of a tile and block; unless joined, gate is let go before up is there."""
        if self.mlp.gating is not None:
            gate_NJ, up_NJ = self.project_both(tile, gate_up, block)
            self.mlp.gating.forward_(gate_NJ, up_NJ)
            return gate_NJ
        if self.mlp.pieces.joined:
            gate_NJ, up_NJ = self.project_both(tile, gate_up, block)
            return self.mlp.act_fn(gate_NJ).mul_(up_NJ)
        return self.mlp.act_fn(self.project(0, tile, gate_up, block)).mul_(self.project(1, tile, gate_up, block))


def _resident(linear: PackedLinear) -> Packed:
    if linear.weight is None or isinstance(linear.weight, Tensor):
        raise RuntimeError("the packed weight of this layer is not resident")
    return linear.weight


class _GatedMLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: PackedGatedMLP, *adapters: Tensor | None) -> Tensor:
        ctx.mlp = mlp
        ctx.save_for_backward(x, *(matrix for matrix in adapters if matrix is not None))
        if not mlp.down_proj.value_needed:
            return x.new_zeros(1).expand(*x.shape[:-1], mlp.down_proj.out_features)
        return _forward(mlp, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        flat_g = grads[0].reshape(-1, grads[0].shape[-1])
        dx, adapter_grads = _backward(ctx.mlp, x.reshape(-1, x.shape[-1]), flat_g, need_x=ctx.needs_input_grad[0])
        return (None if dx is None else dx.view_as(x), None, *adapter_grads)


def _forward(mlp: PackedGatedMLP, x_ND: Tensor) -> Tensor:
    run, down = _Pass(mlp, x_ND), mlp.down_proj
    lora = run.lora[2]
    rank = 0 if lora is None else lora[0].shape[1]
    make, dtype = (torch.empty, x_ND.dtype) if run.is_whole else (torch.zeros, torch.float32)
    sum_ND = make(len(x_ND), down.out_features, dtype=dtype, device=x_ND.device)
    low_NR = None if lora is None else make(len(x_ND), rank, dtype=dtype, device=x_ND.device)
    for block in run.blocks():
        weights = run.weights(block)
        for tile in run.tiles():
            _forward_tile(run, block, tile, weights=weights, sum_ND=sum_ND, low_NR=low_NR)
    if down.bias is not None:
        sum_ND += down.bias
    if lora is not None and low_NR is not None:
        if run.is_whole:
            sum_ND.addmm_(low_NR, lora[1], alpha=down.scale)
        else:
            add_product(sum_ND, low_NR.to(x_ND.dtype), lora[1], alpha=down.scale)
    return sum_ND.to(x_ND.dtype)


def _forward_tile(
    run: _Pass, block: slice, tile: slice, *, weights: tuple[Tensor, Tensor], sum_ND: Tensor, low_NR: Tensor | None
) -> None:
    """Add a tile's share of a block; in a function of its own, so that no intermediate lives on into the next tile."""
    gate_up, down_DJ = weights
    lora = run.lora[2]
    inner_NJ = run.inner(tile, gate_up, block)
    if run.is_whole:
        torch.mm(inner_NJ, down_DJ.t(), out=sum_ND[tile])
    else:
        add_product(sum_ND[tile], inner_NJ, down_DJ.t())
    if lora is None or low_NR is None:
        return
    if run.is_whole:
        torch.mm(inner_NJ, lora[0], out=low_NR[tile])
    else:
        add_product(low_NR[tile], inner_NJ, lora[0][block])


@dataclass(frozen=True, eq=False)
class _AdapterSums:
    """The sums of one adapter: fp32 gradients of A (`da`) and B (`db`), and a low-rank (N, R) sum.

    Gate and up: `low_NR` is x A, `low_sum_NR` adds up its gradient. Down: `low_NR` is g B^T, `low_sum_NR` adds up the
    intermediate times A. `a` and `b` are in the dtype of x.
    """

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor
    low_NR: Tensor
    low_sum_NR: Tensor


class _BackwardSums:
    """What the backward adds up over blocks and tiles: dx (N, D), and the sums of each adapter (None: there is none)."""

    def __init__(self, run: _Pass, g_ND: Tensor, *, need_x: bool) -> None:
        x_ND, down = run.x_ND, run.lora[2]
        self.g_ND = g_ND
        self.dx_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device) if need_x else None
        low_NR = (*run.low_NR, None if down is None else g_ND @ down[1].t())
        self.gate, self.up, self.down = (_adapter_sums(*both) for both in zip(run.lora, low_NR, strict=True))


def _adapter_sums(pair: tuple[Tensor, Tensor] | None, low_NR: Tensor | None) -> _AdapterSums | None:
    if pair is None or low_NR is None:
        return None
    da, db = (torch.zeros_like(matrix, dtype=torch.float32) for matrix in pair)
    return _AdapterSums(*pair, da, db, low_NR, torch.zeros(low_NR.shape, device=low_NR.device))


def _backward(
    mlp: PackedGatedMLP, x_ND: Tensor, g_ND: Tensor, *, need_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of A and B of gate, up and down; None where none is needed or no adapter is."""
    run = _Pass(mlp, x_ND)
    sums = _BackwardSums(run, g_ND, need_x=need_x)
    for block in run.blocks():
        weights = run.weights(block)
        for tile in run.tiles():
            _backward_tile(run, sums, block, tile, weights=weights)
    for linear, adapter in ((mlp.gate_proj, sums.gate), (mlp.up_proj, sums.up)):
        if adapter is None:
            continue
        low_grad = adapter.low_sum_NR.to(x_ND.dtype)
        add_product(adapter.da, x_ND.t(), low_grad)
        if sums.dx_ND is not None:
            add_product(sums.dx_ND, low_grad, adapter.a.t(), alpha=linear.scale)
    if sums.down is not None:
        add_product(sums.down.db, sums.down.low_sum_NR.to(g_ND.dtype).t(), g_ND)
    grads: list[Tensor | None] = []
    for linear, adapter in zip(run.linears, (sums.gate, sums.up, sums.down), strict=True):
        grads += [None, None] if adapter is None else [matrix.mul_(linear.scale) for matrix in (adapter.da, adapter.db)]
    return None if sums.dx_ND is None else sums.dx_ND.to(x_ND.dtype), grads


def _backward_tile(run: _Pass, sums: _BackwardSums, block: slice, tile: slice, *, weights: tuple[Tensor, Tensor]) -> None:
    """Add one tile's share of one block to the sums; at most six (tile, J) tensors exist at a time, by a `Gating` three."""
    gate_up, down_DJ = weights
    gate_NJ, up_NJ = run.project_both(tile, gate_up, block)
    d_inner_NJ = sums.g_ND[tile] @ down_DJ
    down = sums.down
    if down is not None:
        d_inner_NJ.addmm_(down.low_NR[tile], down.a[block].t(), alpha=run.mlp.down_proj.scale)
    if run.mlp.gating is not None:
        run.mlp.gating.backward_(gate_NJ, up_NJ, d_inner_NJ)
        if down is not None:
            _add_to_down(down, block, tile, d_inner_NJ)
        del d_inner_NJ
        _add_to_factors(run, sums, block, tile, slopes=(gate_NJ, up_NJ), gate_up=gate_up)
        return
    with torch.enable_grad():
        leaf_NJ = gate_NJ.detach().requires_grad_()
        active_NJ = run.mlp.act_fn(leaf_NJ)
    (d_gate_NJ,) = torch.autograd.grad(active_NJ, leaf_NJ, d_inner_NJ * up_NJ)
    active_NJ = active_NJ.detach()
    del gate_NJ, leaf_NJ
    if down is not None:
        _add_to_down(down, block, tile, up_NJ.mul_(active_NJ))
    del up_NJ
    d_up_NJ = d_inner_NJ.mul_(active_NJ)
    del active_NJ, d_inner_NJ
    _add_to_factors(run, sums, block, tile, slopes=(d_gate_NJ, d_up_NJ), gate_up=gate_up)


def _add_to_down(down: _AdapterSums, block: slice, tile: slice, inner_NJ: Tensor) -> None:
    """Add a piece of the intermediate to the sums of the last matrix' adapter."""
    add_product(down.low_sum_NR[tile], inner_NJ, down.a[block])
    add_product(down.da[block], inner_NJ.t(), down.low_NR[tile])


def _add_to_factors(
    run: _Pass, sums: _BackwardSums, block: slice, tile: slice, *, slopes: tuple[Tensor, Tensor], gate_up: Tensor
) -> None:
    """Add the gradients of a piece of gate(x) and up(x) to the sums of their adapters and of x."""
    for adapter, d_NJ, weight_JD in zip((sums.gate, sums.up), slopes, gate_up.chunk(2), strict=True):
        if adapter is not None:
            add_product(adapter.db[:, block], adapter.low_NR[tile].t(), d_NJ)
            add_product(adapter.low_sum_NR[tile], d_NJ, adapter.b[:, block].t())
        if sums.dx_ND is not None:
            add_product(sums.dx_ND[tile], d_NJ, weight_JD)
