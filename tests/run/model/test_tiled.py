"""A norm in tiles of rows: bitwise the module run whole, its graph keeps the input alone, a call takes a tile's bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.run.model import tiled
from lopt_edge.run.model.tiled import TokenTiled
from lopt_edge.run.watch.tracker import MemoryTracker

DTYPES = [torch.float32, torch.bfloat16]
WIDTH = 64


def make_norm(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    norm = kind(WIDTH)
    norm.weight = nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), requires_grad=False)
    return norm.to(dtype)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def value_and_gradient(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


@pytest.fixture
def rows_a_tile(monkeypatch):
    def choose(n_rows: int, dtype: torch.dtype) -> None:
        kind = replace(CPU, norm_tile_bytes=n_rows * WIDTH * dtype.itemsize)
        monkeypatch.setattr(tiled, "kind_of", lambda name: kind)

    return choose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("n_rows", [1, 7, 20, 1000])  # of 20: tiles of one row, a rest, exactly one tile, less than one
def test_values_and_gradients_are_bitwise_those_of_the_whole(rows_a_tile, n_rows, kind, dtype):
    rows_a_tile(n_rows, dtype)
    norm = make_norm(kind, dtype)
    for shape in [(2, 10, WIDTH), (20, WIDTH), (1, 20, 1, WIDTH)]:
        x, g = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
        y, dx = value_and_gradient(TokenTiled(norm), x, g)
        expected_y, expected_dx = value_and_gradient(norm, x, g)
        assert (y.shape, y.dtype, dx.shape, dx.dtype) == (x.shape, dtype, x.shape, dtype)
        assert torch.equal(y, expected_y)
        assert torch.equal(dx, expected_dx)
        assert dx.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_transposed_tensor(rows_a_tile, dtype):
    """Rows that do not lie one after the other, as of queries by head."""
    rows_a_tile(3, dtype)
    x, g = (draw(2, 5, 4, WIDTH, dtype=dtype, seed=seed).transpose(1, 2) for seed in (0, 1))
    norm = make_norm(LlamaRMSNorm, dtype)
    for ours, theirs in zip(value_and_gradient(TokenTiled(norm), x, g), value_and_gradient(norm, x, g), strict=True):
        assert torch.equal(ours, theirs)


def test_each_row_is_seen_once_and_whole(rows_a_tile):
    rows_a_tile(8, torch.float32)
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x * 2

    TokenTiled(Spy())(torch.ones(20, WIDTH))
    assert seen == [8, 8, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_takes_a_tile_beside_its_result(rows_a_tile, dtype):
    """However many rows there are."""
    rows_a_tile(16, dtype)
    norm = TokenTiled(make_norm(LlamaRMSNorm, dtype))
    assert within(norm, 16, dtype) == within(norm, 64, dtype) == within(norm, 1000, dtype)
    half = within(norm, 1000, dtype)
    rows_a_tile(32, dtype)
    assert within(norm, 1000, dtype) == pytest.approx([2 * n_bytes for n_bytes in half], rel=0.01)
    assert min(half) >= 16 * WIDTH * dtype.itemsize


def within(norm: TokenTiled, n_rows: int, dtype: torch.dtype) -> list[int]:
    """(most of the forward, most of the backward) beside the results."""
    x, g = draw(n_rows, WIDTH, dtype=dtype).requires_grad_(), draw(n_rows, WIDTH, dtype=dtype)
    tracker, found = MemoryTracker(), []
    with tracker:
        tracker.watch([x, g, norm.weight])
        before = tracker.live_bytes
        y = norm(x)
        found.append(tracker.peak_bytes - before - y.nbytes)
        assert tracker.live_bytes - before == y.nbytes, "the graph holds x alone"
        tracker.start_peak()
        dx = torch.autograd.grad(y, x, g)[0]
        found.append(tracker.peak_bytes - before - y.nbytes - dx.nbytes)
        assert tracker.live_bytes - before == y.nbytes + dx.nbytes
    return found


def test_the_weight_is_the_modules_and_gets_no_gradient():
    inner = make_norm(LlamaRMSNorm, torch.float32)
    norm = TokenTiled(inner)
    assert norm.weight is inner.weight
    norm(draw(3, WIDTH, dtype=torch.float32).requires_grad_()).sum().backward()
    assert inner.weight.grad is None
