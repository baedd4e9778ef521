"""Attention in tiles of queries against transformers' eager attention of Gemma 2 and of gpt-oss (sinks), its masks, and
autograd through both.

One tile: values and gradients bitwise. Several: within rounding, and in bfloat16 no further from the exact ones than eager.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AttentionMaskInterface, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from lopt_edge.plan.costs import module_bytes, tiles
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.run.model import query_tiles
from lopt_edge.run.watch.tracker import MemoryTracker
from tests.pairs import pairs
from tools.tiny_models import tiny_config

DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(4, 2), (4, 4), (4, 1)]
Attention = tuple[Tensor, tuple[Tensor, ...]]


def random_heads(n: int, heads: tuple[int, int], dtype: torch.dtype, *, n_sequences: int = 2) -> list[Tensor]:
    """Query, key and value as projections give them: (B, heads, T, E), features of all heads side by side."""
    generator = torch.Generator().manual_seed(n)
    shapes = [(n_sequences, n, n_heads, 32) for n_heads in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).mul(3).to(dtype).transpose(1, 2) for shape in shapes]


def masks_of(
    kernel: str, inputs: Tensor, *, window: int | None, padding: Tensor | None = None, cache: DynamicCache | None = None
) -> Tensor | None:
    query_tiles.register()
    config = tiny_config("gemma2", sliding_window=window or 8)
    config._attn_implementation = kernel
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    return make(config, inputs, padding, cache)


def run(
    kernel: str, heads: list[Tensor], *, window: int | None = None, padding: Tensor | None = None, cap: float | None = 5.0
) -> Attention:
    """The output, and the gradients of query, key and value."""
    leaves = [head.detach().requires_grad_() for head in heads]
    n_sequences, n_heads, n, _ = heads[0].shape
    mask = masks_of(kernel, heads[0].new_zeros(n_sequences, n, 8), window=window, padding=padding)
    module = SimpleNamespace(num_key_value_groups=n_heads // heads[1].shape[1], training=False)
    attend = eager_attention_forward if kernel == "eager" else query_tiles.attend
    out, _ = attend(module, *leaves, mask, scaling=0.25, softcap=cap, sliding_window=window)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaves, g)


def ours(heads: list[Tensor], **how) -> Attention:
    return run(query_tiles.NAME, heads, **how)


def assert_same(found: Attention, expected: Attention) -> None:
    assert torch.equal(found[0], expected[0])
    for name, mine, theirs in zip(("query", "key", "value"), found[1], expected[1], strict=True):
        assert torch.equal(mine, theirs), name


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def tiles_of(monkeypatch):
    """Set the tile to so many queries of (heads, tokens)."""

    def cut(n_queries: int, heads: tuple[int, int], n: int) -> None:
        kind = replace(CPU, score_bytes=4 * n_queries * heads[0] // heads[1] * n)
        monkeypatch.setattr(tiles, "kind_of", lambda name: kind)

    return cut


@pytest.mark.parametrize(("dtype", "heads", "n", "window"), pairs(DTYPES, HEADS, [1, 2, 7, 21], [None, 8]))
def test_one_tile_is_eager_bitwise(dtype, heads, n, window):
    """With several sequences torch lays eager's keys out anew, unless they are repeated: a few tokens, another kernel."""
    given = random_heads(n, heads, dtype, n_sequences=2 if heads == (4, 2) else 1)
    assert_same(ours(given, window=window), run("eager", given, window=window))


@pytest.mark.parametrize("cap", [None, 0.5])
def test_other_caps(cap):
    given = random_heads(21, (4, 2), torch.float32)
    assert_same(ours(given, cap=cap), run("eager", given, cap=cap))


def with_sinks(kernel: str, heads: list[Tensor], *, window: int | None) -> Attention:
    """The output, and the gradients of query, key and value, of attention with a sink for each head."""
    leaves, n = [head.detach().requires_grad_() for head in heads], heads[0].shape[2]
    sinks = torch.linspace(-2, 3, heads[0].shape[1]).to(heads[0].dtype)
    mask = masks_of(kernel, heads[0].new_zeros(len(heads[0]), n, 8), window=window)
    module = SimpleNamespace(num_key_value_groups=heads[0].shape[1] // heads[1].shape[1], training=False, sinks=sinks)
    attend = gpt_oss_attention if kernel == "eager" else query_tiles.attend
    out, _ = attend(module, *leaves, mask, scaling=0.25, sliding_window=window, s_aux=sinks)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaves, g)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize(("n", "heads"), [(1, (4, 2)), (21, (4, 2)), (21, (4, 1))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_are_gpt_oss(tiles_of, dtype, n, heads, window):
    """One tile: the output is eager's, bitwise. In fp32 gradients, and several tiles, within rounding."""
    given = random_heads(n, heads, dtype)
    expected, found = with_sinks("eager", given, window=window), with_sinks(query_tiles.NAME, given, window=window)
    assert torch.equal(found[0], expected[0])
    plain = run("eager", given, cap=None, window=window)[0]
    assert not torch.allclose(plain, expected[0], rtol=0.05, atol=0.01)
    if dtype == torch.bfloat16 or n == 1:  # one key: nothing but rounding comes back to query and key
        return
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert distance(mine, theirs) < 2e-6
    tiles_of(5, heads, n)
    out, gradients = with_sinks(query_tiles.NAME, given, window=window)
    assert distance(out, expected[0]) < 3e-7
    for mine, theirs in zip(gradients, expected[1], strict=True):
        assert distance(mine, theirs) < 2e-6


@pytest.mark.parametrize("window", [None, 16])
def test_in_bfloat16_sinks_are_no_further_from_the_exact_values_than_eager(window):
    given = random_heads(64, (4, 2), torch.bfloat16)
    exact = with_sinks("eager", [head.double() for head in given], window=window)
    found, eager = (with_sinks(kernel, given, window=window) for kernel in (query_tiles.NAME, "eager"))
    for mine, theirs, true in zip((found[0], *found[1]), (eager[0], *eager[1]), (exact[0], *exact[1]), strict=True):
        assert distance(mine, true) <= 1.1 * distance(theirs, true)


@pytest.mark.parametrize(("heads", "n_queries", "window"), pairs(HEADS, [1, 7, 32, 63], [None, 5, 16, 60]))
def test_several_tiles_are_eager_up_to_rounding(tiles_of, heads, n_queries, window):
    given, n = random_heads(64, heads, torch.float32), 64
    expected = run("eager", given, window=window)
    tiles_of(n_queries, heads, n)
    out, gradients = ours(given, window=window)
    assert distance(out, expected[0]) < 3e-7
    for mine, theirs in zip(gradients, expected[1], strict=True):
        assert distance(mine, theirs) < 1e-6


@pytest.mark.parametrize("window", [None, 16])
def test_in_bfloat16_tiles_are_no_further_from_the_exact_values_than_eager(tiles_of, window):
    heads, n = (4, 2), 64
    given = random_heads(n, heads, torch.bfloat16)
    exact, eager = run("eager", [head.double() for head in given], window=window), run("eager", given, window=window)
    tiles_of(7, heads, n)
    out, gradients = ours(given, window=window)
    assert distance(out, exact[0]) <= 1.01 * distance(eager[0], exact[0])
    for mine, theirs, true in zip(gradients, eager[1], exact[1], strict=True):
        assert distance(mine, true) <= 1.1 * distance(theirs, true)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 4])
def test_padding_is_eagers_also_in_rows_that_see_nothing(tiles_of, window, side):
    """Left padding: the first queries see no key at all, and eager gives them the mean of all values."""
    heads, n, padding = (4, 2), 12, torch.ones(2, 12, dtype=torch.int64)
    padding[1, :5] = 0
    padding = padding if side == "left" else padding.flip(1)
    given = random_heads(n, heads, torch.float32)
    expected = run("eager", given, window=window, padding=padding)
    assert_same(ours(given, window=window, padding=padding), expected)
    tiles_of(5, heads, n)
    out, gradients = ours(given, window=window, padding=padding)
    for mine, theirs in zip((out, *gradients), (expected[0], *expected[1]), strict=True):
        assert distance(mine, theirs) < 1e-6


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("n_new", [1, 3])
def test_new_queries_after_cached_keys(tiles_of, n_new, window):
    """As in generation: the last query is at the last key, whatever the tile."""
    query, key, value = random_heads(21, (4, 2), torch.float32)
    whole = run("eager", [query, key, value], window=window)[0]
    for n_queries in (1, 2, 100):
        tiles_of(n_queries, (4, 2), 21)
        out, _ = query_tiles.attend(
            torch.nn.Module(), query[:, :, -n_new:], key, value, None, scaling=0.25, softcap=5.0, sliding_window=window
        )
        torch.testing.assert_close(out, whole[:, -n_new:], rtol=1e-5, atol=1e-6)


def test_no_mask_is_made_unless_it_says_more_than_the_tile_knows():
    hidden, cache = torch.zeros(2, 12, 8), DynamicCache()
    cache.update(torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 5, 4), 0)
    padded = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    assert masks_of(query_tiles.NAME, hidden, window=None) is None
    assert masks_of(query_tiles.NAME, hidden, window=8) is None
    assert masks_of(query_tiles.NAME, hidden, window=None, cache=cache) is None
    assert torch.equal(
        masks_of(query_tiles.NAME, hidden, window=None, padding=padded),
        masks_of("eager", hidden, window=None, padding=padded),
    )
    static = {"batch_size": 2, "q_length": 3, "kv_length": 12, "dtype": torch.float32}  # a cache with room to spare
    assert AttentionMaskInterface()[query_tiles.NAME](**static).shape == (2, 1, 3, 12)


def test_dropout_is_refused():
    with pytest.raises(NotImplementedError, match="dropout"):
        query_tiles.attend(torch.nn.Module(), *random_heads(3, (4, 2), torch.float32), None, dropout=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_grow_linearly_in_tokens(monkeypatch, dtype):
    """Beside a tile's there are outputs, gradients and the sums of one head of keys. The tile is a sixteenth of a CPU's: a
    quarter of the tokens has as many of them, and bfloat16 is slow on many a CPU."""
    kind = replace(CPU, score_bytes=CPU.score_bytes // 16)
    monkeypatch.setattr(tiles, "kind_of", lambda name: kind)

    def peaks(kernel: str, n: int) -> int:
        heads, tracker = random_heads(n, (4, 2), dtype, n_sequences=1), MemoryTracker()
        with tracker:
            tracker.watch(heads)
            before = tracker.live_bytes
            run(kernel, heads)
        return tracker.peak_bytes - before

    tile = kind.score_bytes
    found = {n: peaks(query_tiles.NAME, n) for n in (256, 512, 1024)}
    for n, n_bytes in found.items():
        per_token = 32 * (dtype.itemsize * (4 + 4 + 4 + 2 + 2) + 8 + 8)  # outputs, their gradient, dq, dk, dv; sums
        assert n_bytes <= 4 * tile + n * per_token
    assert found[1024] - found[512] <= 1.1 * 2 * (found[512] - found[256]) + tile // 8
    assert peaks("eager", 512) > 3 * found[512]


@pytest.mark.parametrize(
    ("family", "dtype", "heads", "n_queries", "window"),
    pairs(["gemma2", "gpt_oss"], DTYPES, HEADS, [3, 40, 100], [None, 16]),
)
def test_the_planner_knows_the_bytes_of_a_call(tiles_of, family, dtype, heads, n_queries, window):
    """To the byte, beside the output, and the gradients of query, key and value."""
    tiles_of(n_queries, heads, 100)
    how = {"softcap": 5.0} if family == "gemma2" else {"s_aux": torch.zeros(heads[0], dtype=dtype)}
    config = tiny_config(family, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=32)
    shape = LayerShape(facts_from_config(config.to_dict(), where="here"), dtype.itemsize, 4, ())
    leaves, tracker = [head.requires_grad_() for head in random_heads(100, heads, dtype)], MemoryTracker()
    n_bytes = [leaf.numel() * dtype.itemsize for leaf in leaves]
    with tracker:
        tracker.watch([*leaves, *(value for value in how.values() if isinstance(value, Tensor))])
        before = tracker.live_bytes
        out, _ = query_tiles.attend(torch.nn.Module(), *leaves, None, scaling=0.25, sliding_window=window, **how)
        forward = tracker.peak_bytes - before - n_bytes[0]
        g = torch.ones_like(out)
        tracker.start_peak()
        before = tracker.live_bytes
        torch.autograd.grad(out, leaves, g)
        backward = tracker.peak_bytes - before - sum(n_bytes)
    for measured, formula in ((forward, module_bytes.attention_forward), (backward, module_bytes.attention_backward)):
        heap = module_bytes.Heap()
        formula(heap, shape, 100, window)
        assert heap.peak == measured
