"""The arithmetic of `quant.sizes` against the tensors that packing really makes: bytes must agree exactly."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.nf4 import pack
from quant.sizes import CODE_MAP_BYTES, DTYPE_BYTES, NESTED_MAP_BYTES, packed_sizes

SIDES = st.integers(1, 200)


@settings(deadline=None, max_examples=60)
@given(rows=SIDES, columns=SIDES)
def test_sizes_are_the_bytes_of_real_packed_tensors(rows, columns):
    packed = pack(torch.ones(rows, columns))
    sizes = packed_sizes((rows, columns))
    assert sizes.codes_bytes == packed.codes.nbytes
    assert sizes.absmax_bytes == packed.absmax.nbytes
    assert sizes.nested_absmax_bytes == packed.nested_absmax.nbytes
    assert sizes.maps_bytes == packed.code_map.nbytes + packed.nested_map.nbytes == CODE_MAP_BYTES + NESTED_MAP_BYTES
    assert sizes.total_bytes == packed.n_bytes == sizes.codes_bytes + sizes.scales_bytes


def test_many_nested_blocks():
    """More than one scale of scales: 300 x 640 elements are 3000 blocks, 12 nested ones."""
    packed = pack(torch.randn(300, 640))
    assert packed.nested_absmax.numel() == 12
    assert packed_sizes((300, 640)).total_bytes == packed.n_bytes == 300 * 640 // 2 + 3000 + 12 * 4


def test_element_sizes_are_those_of_torch():
    from quant.files import TORCH_DTYPES

    for name, dtype in TORCH_DTYPES.items():
        assert DTYPE_BYTES[name] == dtype.itemsize, name
