"""Attention of sequences in one row: bitwise that of each sequence alone, by every way in which it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lopt_edge.run.model.sequences import Sequences, at_once, attend, one_by_one

LENGTHS = (7, 1, 33, 130)
SCALE = 0.25


def drawn(n_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of a row as projections give them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(n_heads)
    shapes = [(1, sum(LENGTHS), heads, 16) for heads in (4, n_heads, n_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    return [q, k, v, torch.randn(shapes[0], generator=generator).to(dtype)]


def with_gradients(run, parts: list[Tensor], g: Tensor) -> list[Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def alone(parts: list[Tensor], g: Tensor, *, window: int | None) -> list[Tensor]:
    """Each sequence by itself as transformers runs it, side by side again: output and gradients."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        if window is None or n <= window:
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=grouped).transpose(1, 2)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        place = torch.arange(n)
        mask = (place <= place[:, None]) & (place > place[:, None] - window)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE).transpose(1, 2)

    found = [with_gradients(run, [x[:, :, at] for x in parts], g[:, at]) for at in Sequences(LENGTHS)]
    out, *gradients = zip(*found, strict=True)
    return [torch.cat(out, dim=1), *(torch.cat(each, dim=2) for each in gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_heads", "window"), [(2, None), (4, None), (4, 20), (2, 20)])
def test_each_sequence_is_attended_to_as_if_alone(n_heads, window, dtype):
    *parts, g = drawn(n_heads, dtype)
    row = Sequences(LENGTHS, window)
    expected = alone(parts, g, window=window)
    ours = with_gradients(lambda q, k, v: attend(None, q, k, v, None, scaling=SCALE, sequences=row)[0], parts, g)
    for name, one, other in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        repeated = window is not None and n_heads < 4 and name in ("dk", "dv")  # transformers sums repeated keys later
        if repeated:
            assert (one - other).norm() <= (1e-6 if dtype == torch.float32 else 5e-3) * other.norm(), name
        else:
            assert torch.equal(one, other), name
    if dtype == torch.float32:
        other_way = with_gradients(lambda q, k, v: one_by_one(q, k, v, row, SCALE), parts, g)
        for one, other in zip(other_way, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_call_for_all_sequences_is_one_that_torch_has():
    """The kernel is CUDA's, so only shapes and arguments are checked: torch's own fake of it stands in."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, 12, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
        assert at_once(q, k, v, Sequences((5, 7), window=4), SCALE).shape == (1, 12, 4, 16)


def test_rows_positions_and_masks():
    row = Sequences((2, 3), window=2)
    assert list(row) == [slice(0, 2), slice(2, 5)]
    assert row.positions(torch.device("cpu")).tolist() == [0, 1, 0, 1, 2]
    assert row.mask(2, torch.zeros(())) is None
    assert (row.mask(3, torch.zeros(())) == 0).tolist() == [[True, False, False], [True, True, False], [False, True, True]]
