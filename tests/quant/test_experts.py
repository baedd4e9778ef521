"""Experts on packed weights against transformers' own module with the same numbers: values bitwise, gradients of autograd.

Whatever the routing: all tokens to the same experts, each token to all of them, experts that no token goes to, more tokens
than a tile.
"""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from quant.experts import ExpertMatrix, PackedExperts, routed
from quant.linear import UnpackBuffer
from quant.nf4 import pack
from quant.sizes import expert_tile

HIDDEN, INNER, COUNT = 64, 128, 5
ROUTINGS = {
    "all to one": lambda n, draw: torch.full((n, 1), 3),
    "each to all": lambda n, draw: torch.arange(COUNT).expand(n, COUNT).contiguous(),
    "drawn": lambda n, draw: torch.rand(n, COUNT, generator=draw).topk(2).indices,
    "two that are never chosen": lambda n, draw: torch.rand(n, 3, generator=draw).topk(2).indices + 1,
}


def both(dtype: torch.dtype) -> tuple[PackedExperts, Qwen3MoeExperts]:
    """Our module, and transformers' with the weights as ours unpack."""
    draw = torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=COUNT)
    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    matrices = []
    for expert in range(COUNT):
        shapes, packed = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)), []
        for shape in shapes:
            packed.append(ExpertMatrix(shape, pack(torch.randn(shape, generator=draw) * shape[1] ** -0.5)))
        gate, up, down = (one.weight.unpack_into(torch.empty(one.shape, dtype=dtype)) for one in packed)
        theirs.gate_up_proj[expert], theirs.down_proj[expert] = torch.cat([gate, up]), down
        matrices.append(packed)
    return PackedExperts(matrices, gate=theirs._apply_gate, buffer=UnpackBuffer()), theirs


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("n_tokens", [1, 19, 2 * expert_tile(on_cpu=True) + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_transformers_and_gradients_autograds(routing, n_tokens, dtype):
    ours, theirs = both(dtype)
    draw = torch.Generator().manual_seed(1)
    index = ROUTINGS[routing](n_tokens, draw)
    x, g = (torch.randn(n_tokens, HIDDEN, generator=draw).to(dtype) for _ in range(2))
    weights = torch.rand(index.shape, generator=draw).to(dtype)
    found = []
    for experts in (ours, theirs):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = experts(leaves[0], index, leaves[1])
        found.append((y.detach(), *torch.autograd.grad(y, leaves, g)))
    (mine, *gradients), (reference, *expected) = found
    if n_tokens <= expert_tile(on_cpu=True):
        assert torch.equal(mine, reference)
    else:  # whose products have other shapes
        torch.testing.assert_close(mine, reference)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= bound * other.norm()


def test_each_choice_is_in_one_tile_of_its_expert():
    index = ROUTINGS["drawn"](700, torch.Generator().manual_seed(2))
    seen = torch.zeros(2 * 700, dtype=torch.int64)
    order = []
    for expert, places in routed(index, COUNT):
        assert 0 < len(places) <= expert_tile(on_cpu=True)
        assert (index[places % 700, places // 700] == expert).all()
        seen[places] += 1
        order.append(expert)
    assert (seen == 1).all() and order == sorted(order)


def test_weights_that_are_not_there():
    ours, _ = both(torch.float32)
    ours.matrices[2][1].weight = None
    x, weights = torch.ones(3, HIDDEN), torch.ones(3, 1)
    ours(x, torch.ones(3, 1, dtype=torch.int64), weights)  # expert 2 is not asked for
    with pytest.raises(RuntimeError, match="not resident"):
        ours(x, torch.full((3, 1), 2), weights)


def test_a_value_that_nobody_needs_is_not_computed():
    ours, _ = both(torch.float32)
    ours.value_needed = False
    for expert in ours.matrices:
        expert[0].weight = None
    assert not ours(torch.ones(3, HIDDEN), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)).any()
