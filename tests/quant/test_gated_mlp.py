"""The blocked gated MLP against the plain composition: value and every gradient, in fp32 and bf16, with many blocks and
tiles; and its memory rule, that the graph keeps x alone and no tensor of (tokens x intermediate) is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quant.gated_mlp import PackedGatedMLP, blocks_fit
from quant.linear import PackedLinear, UnpackBuffer
from quant.nf4 import pack
from quant.sizes import PIECES, MlpPieces

HIDDEN, INNER, TOKENS = 128, 320, 50


def make_mlp(
    dtype: torch.dtype,
    *,
    lora: tuple[bool, bool, bool] = (True, True, True),
    bias: bool = False,
    pieces: MlpPieces = PIECES,
) -> PackedGatedMLP:
    generator, buffer = torch.Generator().manual_seed(1), UnpackBuffer()

    def linear(n_in: int, n_out: int, with_lora: bool) -> PackedLinear:
        layer = PackedLinear(n_in, n_out, buffer=buffer)
        layer.weight = pack(torch.randn(n_out, n_in, generator=generator) * n_in**-0.5)
        layer.bias = torch.randn(n_out, generator=generator).to(dtype) if bias else None
        if with_lora:
            a, b = torch.randn(n_in, 4, generator=generator), torch.randn(4, n_out, generator=generator)
            layer.attach(nn.Parameter(a * n_in**-0.5), nn.Parameter(b * 0.5), scale=2.0)
        return layer

    parts = (linear(HIDDEN, INNER, lora[0]), linear(HIDDEN, INNER, lora[1]), linear(INNER, HIDDEN, lora[2]))
    return PackedGatedMLP(*parts, act_fn=nn.SiLU(), pieces=pieces)


def run(mlp: PackedGatedMLP, x: torch.Tensor, g: torch.Tensor, *, blocked: bool) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = mlp(x) if blocked else mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    y.backward(g)
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in mlp.named_parameters():
        found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora", [(True, True, True), (True, False, False), (False, False, True), (False, False, False)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("pieces", [MlpPieces(128, 16), MlpPieces(128, 16, joined=True), MlpPieces(INNER, 16, joined=True)])
def test_equals_the_plain_composition(pieces, dtype, bound, lora, bias):
    """In blocks of 128 + 128 + 64 features, and of all of them."""
    mlp = make_mlp(dtype, lora=lora, bias=bias, pieces=pieces)
    x, g = torch.randn(2, TOKENS // 2, HIDDEN).to(dtype), torch.randn(2, TOKENS // 2, HIDDEN).to(dtype)
    plain, blocked = run(mlp, x, g, blocked=False), run(mlp, x, g, blocked=True)
    assert plain.keys() == blocked.keys()
    assert len(plain) == 2 + 2 * sum(lora)
    for name, value in plain.items():
        assert (blocked[name] - value).norm() <= bound * value.norm(), name


def test_a_recomputed_layer_gives_the_same_gradients_without_a_value():
    mlp = make_mlp(torch.float32)
    x, g = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    with_value = run(mlp, x, g, blocked=True)
    mlp.down_proj.value_needed = False
    without = run(mlp, x, g, blocked=True)
    assert not without.pop("y").any()
    assert all(torch.equal(value, with_value[name]) for name, value in without.items())


def test_no_whole_intermediate():
    """No op's result has (tokens x intermediate) elements, forward or backward."""
    mlp, n_tokens = make_mlp(torch.float32, pieces=MlpPieces(features=64)), 1000
    x, g = torch.randn(n_tokens, HIDDEN), torch.randn(n_tokens, HIDDEN)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        run(mlp, x, g, blocked=True)
    assert n_tokens * HIDDEN <= largest < n_tokens * INNER


def test_large_quantisation_blocks_are_not_cut():
    """A foreign folder may use blocks of 4096: its columns cannot be cut, so it keeps the plain MLP."""
    assert blocks_fit(8192, 64, PIECES.features)
    assert not blocks_fit(8192, 4096, PIECES.features)
    assert blocks_fit(8192, 4096, 8192)
