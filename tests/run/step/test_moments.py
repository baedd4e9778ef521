"""The storage forms of AdamW's moments: nothing is exactly nothing, and 8 bits keep what their blocks can."""

from __future__ import annotations

import pytest
import torch

from lopt_edge.run.step.moments import BLOCK, make_moments

CPU = torch.device("cpu")


@pytest.mark.parametrize("n_elements", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_zero_state_is_exactly_zero(optimizer, n_elements):
    """Before the first step, and still after an update by nothing: an unused group does not drift."""
    storage = make_moments(optimizer, CPU)
    stored = storage.zeros(n_elements)
    for _ in range(2):
        with storage.unpacked(stored, n_elements) as (first, second):
            assert first.shape == second.shape == (n_elements,)
            assert first.dtype == second.dtype == torch.float32
            assert not first.any() and not second.any()


@pytest.mark.parametrize("n_elements", [1, 3, BLOCK + 1, 1000])
def test_eight_bit_moments_are_kept_within_a_block_s_precision(n_elements):
    storage = make_moments("adamw8bit", CPU)
    stored, generator = storage.zeros(n_elements), torch.Generator().manual_seed(3)
    given = [torch.randn(n_elements, generator=generator), torch.rand(n_elements, generator=generator)]
    with storage.unpacked(stored, n_elements) as unpacked:
        for tensor, value in zip(unpacked, given, strict=True):
            tensor.copy_(value)
    with storage.unpacked(stored, n_elements) as unpacked:
        for tensor, value in zip(unpacked, given, strict=True):
            assert (tensor - value).abs().max() <= 0.02 * value.abs().max()
            assert torch.equal(tensor == 0, value == 0)
