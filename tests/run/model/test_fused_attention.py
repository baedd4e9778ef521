"""Attention by named kernels: cut into parts of heads it gives what it gives whole, and torch's own attention's values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lopt_edge.plan.costs.tiles import EFFICIENT, FLASH, backward_bytes, heads_at_once
from lopt_edge.run.model.fused_attention import Kernel, fused

MIB = 1 << 20


def on_host(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)


def on_host_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *saved, scale = rest
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, *saved, 0.0, True, scale=scale)


HOST = Kernel(EFFICIENT, on_host, on_host_backward, repeats=True)  # the CPU's, in the place of a GPU's


def run(at_once: int, *, group: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, n, 33, 16, generator=generator) for n in (4 * group, 4, 4))
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
    out = fused(*leaves, HOST, at_once=at_once)
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("group", "dtype"), [(1, torch.float32), (3, torch.float32), (2, torch.bfloat16)])
def test_parts_of_heads_change_no_bit(group, dtype):
    whole = run(4, group=group, dtype=dtype)
    for at_once in (1, 3):
        for ours, theirs in zip(run(at_once, group=group, dtype=dtype), whole, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("group", [1, 3])
def test_values_and_gradients_are_those_of_torchs_own(group):
    ours = run(1, group=group, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(2, n, 33, 16, generator=generator).double().requires_grad_() for n in (4 * group, 4, 4)]
    out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True).transpose(1, 2)
    out.backward(torch.randn(out.shape, generator=generator).double())
    for mine, reference in zip(ours, [out, *(leaf.grad for leaf in leaves)], strict=True):
        assert (mine - reference).norm() <= 1e-6 * reference.norm()


def test_as_many_heads_as_the_device_allows():
    """Of an 8B (8 heads of keys, 4 of queries each): all together at 2,048 tokens, one by one at 74,000."""
    sizes = {"group": 4, "head_dim": 128, "itemsize": 2}
    known = {"n_kv_heads": 8, "device_type": "cuda", **sizes}
    assert heads_at_once(FLASH, 2048, **known) == 8
    assert heads_at_once(FLASH, 74_000, **known) == 1
    assert 32 <= 8 * backward_bytes(FLASH, 1 << 16, **sizes) / (1 << 26) <= 47, "KiB a token, the part's results included"
    assert backward_bytes(FLASH, 74_000, **sizes) < 450 * MIB
