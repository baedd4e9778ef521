"""The delta rule run chunk by chunk against transformers' own module: values, gradients, and what lives inside.

Whole chunks are bitwise transformers'; the last one, where it is shorter, goes through kernels of another width and may
differ in the last bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from lopt_edge.plan.costs.module_bytes import chunk_states
from lopt_edge.plan.costs.programs import Replay
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.run.model.delta_net import DeltaCore, DeltaNet
from lopt_edge.run.watch.tracker import MemoryTracker
from tests.pairs import pairs

HIDDEN = 64


def make_config(n_key: int = 2, n_value: int = 4, key_dim: int = 16, value_dim: int = 24, kernel: int = 4):
    return AutoConfig.for_model(
        "qwen3_5_text",
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        linear_num_key_heads=n_key,
        linear_num_value_heads=n_value,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=kernel,
    )


def make_net(config, dtype: torch.dtype) -> Qwen3_5GatedDeltaNet:
    torch.manual_seed(0)
    net = Qwen3_5GatedDeltaNet(config, 0)
    with torch.no_grad():
        net.A_log.copy_(torch.rand(len(net.A_log)))
        net.dt_bias.normal_()
        net.norm.weight.normal_()
    return net.to(dtype).requires_grad_(False)


def values_and_gradient(module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(g)
    return y.detach(), leaf.grad


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n_tokens", [1, 5, 64, 70, 64 * 8, 64 * 17 + 5])
def test_values_and_gradients_are_those_of_transformers(dtype, bound, n_tokens):
    net = make_net(make_config(), dtype)
    x, g = (torch.randn(2, n_tokens, HIDDEN).to(dtype) for _ in range(2))
    y, dx = values_and_gradient(net, x, g)
    ours, our_dx = values_and_gradient(DeltaNet(net), x, g)
    if n_tokens % 64 == 0 or dtype is torch.bfloat16:
        assert torch.equal(ours, y)
    assert (ours - y).abs().max() <= bound * y.abs().max()
    assert (our_dx - dx).norm() <= bound * dx.norm()


@pytest.mark.parametrize("sizes", [(4, 4, 16, 24, 4), (1, 4, 32, 16, 2), (2, 2, 8, 8, 1)])
def test_other_heads_and_kernels(sizes):
    net = make_net(make_config(*sizes), torch.float32)
    x, g = (torch.randn(1, 100, HIDDEN) for _ in range(2))
    for ours, theirs in zip(values_and_gradient(DeltaNet(net), x, g), values_and_gradient(net, x, g), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_a_cache_goes_through_transformers_module():
    """One token at a time, with the state in a cache, gives what the whole sequence gives."""
    from transformers import DynamicCache

    config = make_config()
    net = make_net(config, torch.float32)
    x = torch.randn(1, 9, HIDDEN)
    cache = DynamicCache(config=config)
    ours = DeltaNet(net)
    parts = [ours(x[:, :6], cache_params=cache), *(ours(x[:, i : i + 1], cache_params=cache) for i in range(6, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "n_tokens", "sizes"),
    pairs([torch.float32, torch.bfloat16], [3, 64, 100, 64 * 8, 64 * 9, 64 * 21 + 1], [(2, 2), (1, 4)]),
)
def test_bytes_inside_are_the_predicted_ones(dtype, n_tokens, sizes):
    n_sequences, n_key = sizes
    config = make_config(n_key, 4)
    core = DeltaCore(make_net(config, dtype))
    facts = facts_from_config(config.to_dict() | {"model_type": "qwen3_5_text"}, where="test")
    shape = LayerShape(facts, dtype.itemsize, 1, ("out_proj",))
    widths = (2 * n_key * 16 + 4 * 24, 4 * 24, 4, 4)
    tensors = [torch.randn(n_sequences, n_tokens, width).to(dtype).requires_grad_() for width in widths]
    measured = []
    with MemoryTracker() as tracker:
        tracker.watch([*tensors, *core.parameters()])
        tracker.start_peak()
        before = tracker.live_bytes
        y = core(*tensors)
        measured.append(tracker.peak_bytes - before - y.nbytes)
        g = torch.ones_like(y)
        tracker.start_peak()
        before = tracker.live_bytes
        found = torch.autograd.grad(y, tensors, g)
        measured.append(tracker.peak_bytes - before - sum(one.nbytes for one in found))
    for name, inside in zip(("delta_forward", "delta_backward"), measured, strict=True):
        replay = Replay(shape, shape.delta_dimensions(n_sequences))
        replay.run(shape.delta_case(n_sequences), name)
        rule = shape.layer.delta
        state = 4 * n_sequences * rule.n_value_heads * rule.key_dim * rule.value_dim
        states = chunk_states(state, n_tokens, backward=name == "delta_backward")
        assert inside == states + replay.heap.peak, name
