"""Puts our norms, gated MLPs and recurrences in the place of a decoder layer's own, once its linear layers are ours.

The rule: what stands in a place computes what stood there, up to the rounding that its own file states. Whether a module
can be replaced is decided here, in what pieces it then works is not. Experts are load.py's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lopt_edge.plan.facts.device_kinds import TORCH, TRITON
from lopt_edge.plan.facts.layers import LayerFacts
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.run.kernels.operators import operators
from lopt_edge.run.model.delta_net import DeltaNet
from lopt_edge.run.model.mamba import MambaNet
from lopt_edge.run.model.tiled import TokenTiled
from quant.gated_mlp import PackedGatedMLP, blocks_fit
from quant.linear import PackedLinear
from quant.sizes import MlpPieces


def tile_norms(layer: nn.Module, facts: ModelFacts, *, like: nn.Module, kernels: str = TORCH) -> None:
    """Put every norm of a layer into a `TokenTiled`: those by name, and in a family without a record those of the hidden
    states that are of the class of the last norm, `like`."""
    for name, module in list(layer.named_modules()):
        if tiles_norm(module, facts, like=like):
            layer.set_submodule(name, TokenTiled(module, is_plain=facts.family.plain_norms, kernels=kernels))


def tiles_norm(module: nn.Module, facts: ModelFacts, *, like: nn.Module) -> bool:
    """Whether a module of a layer is a norm that runs in tiles."""
    if facts.family.unlisted is None:
        return type(module).__name__.endswith("RMSNorm")
    widths = [parameter.shape for parameter in module.parameters()]
    return type(module) is type(like) and bool(widths) and all(tuple(width) == (facts.hidden_size,) for width in widths)


def put_recurrence(layer: nn.Module, facts: LayerFacts) -> None:
    """Put a `DeltaNet` in the place of the family's gated delta rule, a `MambaNet` in that of its state space, if any."""
    if facts.delta is not None:
        name = facts.linears[0].name.rpartition(".")[0]
        layer.set_submodule(name, DeltaNet(layer.get_submodule(name)))
    if facts.mamba is not None:
        layer.set_submodule(facts.mamba.module, MambaNet(layer.get_submodule(facts.mamba.module)))


def block_mlp(layer: nn.Module, block_elements: dict[int, int], *, pieces: MlpPieces, kernels: str = TORCH) -> None:
    """Put a `PackedGatedMLP` in the place of the family's gated MLP. Phi-3's fused projection keeps its own.

    `block_elements`: quantisation block of each packed linear layer, by the module's id.
    """
    mlp: Any = getattr(layer, "mlp", None)
    found = (getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    parts = [part for part in found if isinstance(part, PackedLinear)]
    sizes = dict(block_elements)
    for part in parts:
        if part.weight is not None and not isinstance(part.weight, Tensor):
            sizes[id(part)] = part.weight.block_elements
    if len(parts) != 3 or not all(id(part) in sizes for part in parts):
        return
    if all(blocks_fit(part.in_features, sizes[id(part)], pieces.features) for part in parts):
        gate, up, down = parts
        act_fn = mlp.get_submodule("act_fn")
        gating = SiluGating() if kernels == TRITON and _is_silu(act_fn) else None
        layer.mlp = PackedGatedMLP(gate, up, down, act_fn=act_fn, pieces=pieces, gating=gating)


def _is_silu(act_fn: nn.Module) -> bool:
    values = torch.linspace(-4, 4, 17)
    return torch.equal(act_fn(values), silu(values))


class SiluGating:
    """silu(gate) * up and its backward by our kernels (run/kernels/gated.py)."""

    def forward_(self, gate_NJ: Tensor, up_NJ: Tensor) -> None:
        operators().gate_(gate_NJ, up_NJ)

    def backward_(self, gate_NJ: Tensor, up_NJ: Tensor, d_inner_NJ: Tensor) -> None:
        operators().gate_backward_(gate_NJ, up_NJ, d_inner_NJ)
