"""PackedLinear against plain autograd on a dequantised weight, in float64; and what its graph keeps.

Both sides see the same dequantised weight, so they must agree to float64 rounding; the LoRA branch is written here as the
formula, and autograd finds the gradients that `quant.linear` writes by hand.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from quant.linear import DropoutClock, PackedLinear, UnpackBuffer, dropout_mask
from quant.nf4 import pack, unpack_into

N_IN, N_OUT, RANK, SCALE = 128, 64, 4, 1.5
F64 = torch.float64


def make_layer(*, lora: bool = True, bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = F64) -> PackedLinear:
    generator = torch.Generator().manual_seed(1)
    layer = PackedLinear(N_IN, N_OUT, buffer=UnpackBuffer())
    layer.weight = pack(torch.randn(N_OUT, N_IN, generator=generator))
    if bias:
        layer.bias = torch.randn(N_OUT, generator=generator).to(dtype)
    if lora:
        a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((N_IN, RANK), (RANK, N_OUT)))
        layer.attach(nn.Parameter(a), nn.Parameter(b), scale=SCALE)
    layer.dropout_rate, layer.clock, layer.position = dropout, DropoutClock(seed=3, step=7, active=True), (2, 5)
    return layer


def by_autograd(layer: PackedLinear, x: Tensor) -> Tensor:
    weight = unpack_into(layer.weight, torch.empty(layer.weight.shape, dtype=x.dtype))
    y = nn.functional.linear(x, weight, layer.bias)
    if layer.lora_a is None:
        return y
    dropped = x
    if layer.dropout_rate and layer.clock.active:
        mask = dropout_mask(x.detach().reshape(-1, N_IN), rate=layer.dropout_rate, key=layer.clock.key(2, 5))
        dropped = x * mask.view(x.shape)
    return y + layer.scale * (dropped @ layer.lora_a @ layer.lora_b)


def gradients(layer: PackedLinear, x: Tensor, run) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    wanted = [leaf, *(p for p in (layer.lora_a, layer.lora_b) if p is not None)]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


@pytest.mark.parametrize("shape", [(N_IN,), (5, N_IN), (2, 3, N_IN)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("lora", "bias"), list(itertools.product([False, True], repeat=2)))
def test_forward_and_backward_equal_autograd(lora, bias, dropout, shape):
    layer = make_layer(lora=lora, bias=bias, dropout=dropout)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(F64)
    ours = gradients(layer, x, layer)
    theirs = gradients(layer, x, lambda leaf: by_autograd(layer, leaf))
    assert len(ours) == (4 if lora else 2)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.shape == reference.shape
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_adapters_in_fp32(dtype):
    layer = make_layer(bias=True, dtype=torch.float32)
    layer.bias = layer.bias.to(dtype)
    x = torch.randn(6, N_IN, generator=torch.Generator().manual_seed(2))
    y, dx, da, db = gradients(layer, x.to(dtype), layer)
    assert y.dtype == dx.dtype == dtype
    assert da.dtype == db.dtype == torch.float32
    exact = make_layer(bias=True)
    reference = gradients(exact, x.to(dtype).to(F64), lambda leaf: by_autograd(exact, leaf))
    bound = 1e-5 if dtype is torch.float32 else 3e-2
    for mine, theirs in zip((y, dx, da, db), reference, strict=True):
        assert (mine.to(F64) - theirs).norm() <= bound * theirs.norm()


def saved_by_graph(layer: PackedLinear, x: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    return saved


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("lora", [False, True])
def test_the_graph_keeps_only_the_input_and_the_adapters(lora, dropout):
    layer = make_layer(lora=lora, bias=True, dropout=dropout)
    x = torch.randn(2, 3, N_IN, dtype=F64).requires_grad_()
    saved = {tensor.data_ptr() for tensor in saved_by_graph(layer, x)}
    expected = [x, layer.lora_a, layer.lora_b] if lora else []
    assert saved == {tensor.data_ptr() for tensor in expected}


def test_without_gradient_for_the_input_the_backward_does_not_unpack():
    layer = make_layer()
    x = torch.randn(5, N_IN, dtype=F64)
    expected = gradients(layer, x, layer)[2:]
    y = layer(x)
    layer.weight = None  # whoever unpacks now is refused
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(F64)
    found = torch.autograd.grad(y, [layer.lora_a, layer.lora_b], upstream)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("lora", [False, True])
def test_a_product_that_nobody_reads_is_left_out(lora):
    """`value_needed = False`: zeros for a value, no unpacking in the forward, the same gradients."""
    layer = make_layer(lora=lora, bias=True, dropout=0.4)
    x = torch.randn(2, 3, N_IN, dtype=F64)
    expected = gradients(layer, x, layer)

    def run(leaf: Tensor) -> Tensor:
        weight, layer.weight, layer.value_needed = layer.weight, None, False
        y = layer(leaf)
        layer.weight, layer.value_needed = weight, True
        return y

    found = gradients(layer, x, run)
    assert found[0].shape == expected[0].shape
    assert not found[0].any()
    for mine, reference in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(mine, reference)


def test_a_weight_that_is_not_resident_is_told():
    layer = make_layer()
    y = layer(torch.randn(5, N_IN, dtype=F64).requires_grad_())
    layer.weight = None
    with pytest.raises(RuntimeError, match="not resident"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="not resident"):
        layer(torch.randn(5, N_IN, dtype=F64))


def test_a_frozen_adapter_matrix_gets_no_gradient():
    layer = make_layer()
    layer.lora_a.requires_grad_(False)
    layer(torch.randn(5, N_IN, dtype=F64)).sum().backward()
    assert layer.lora_a.grad is None
    assert layer.lora_b.grad.abs().max() > 0


def test_one_buffer_serves_layers_of_all_sizes():
    buffer = UnpackBuffer()
    layers = []
    for n_out in (64, 192, 128):
        layer = PackedLinear(N_IN, n_out, buffer=buffer)
        layer.weight = pack(torch.randn(n_out, N_IN))
        layers.append(layer)
    x = torch.randn(3, N_IN).requires_grad_()
    outputs = [layer(x) for layer in layers]
    assert [flat.numel() for flat in buffer.flat.values()] == [192 * N_IN], "grown to the largest, one for the dtype"
    for layer, y in zip(layers, outputs, strict=True):  # backward unpacks again, whatever the buffer held last
        weight = unpack_into(layer.weight, torch.empty(layer.weight.shape))
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, weight.sum(0).expand_as(dx), rtol=1e-4, atol=1e-4)
    assert len(buffer.flat) == 1


def test_masks_are_a_function_of_their_key():
    clock = DropoutClock(seed=1, step=2, micro_batch=3)
    base = clock.key(4, 5)
    others = [DropoutClock(9, 2, 3).key(4, 5), DropoutClock(1, 9, 3).key(4, 5), DropoutClock(1, 2, 9).key(4, 5),
              clock.key(9, 5), clock.key(4, 9), DropoutClock(2, 1, 3).key(4, 5), clock.key(5, 4)]  # fmt: skip
    assert len({base, *others}) == 8
    assert all(0 <= key < 2**63 for key in [base, *others])
    like = torch.empty(200, 300)
    mask = dropout_mask(like, rate=0.25, key=base)
    assert torch.equal(mask, dropout_mask(like, rate=0.25, key=base))
    assert not torch.equal(mask, dropout_mask(like, rate=0.25, key=others[0]))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((mask == 0).float().mean().item() - 0.25) < 0.01


def test_dropout_is_off_outside_training_steps():
    layer = make_layer(dropout=0.4)
    x = torch.randn(5, N_IN, dtype=F64)
    layer.clock.active = False
    quiet = layer(x)
    torch.testing.assert_close(quiet, by_autograd(layer, x), rtol=1e-10, atol=1e-10)
    layer.clock.active = True
    assert not torch.equal(layer(x), quiet)
