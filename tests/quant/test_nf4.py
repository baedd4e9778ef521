"""Packing and unpacking against bitsandbytes, bit for bit, and against the original weight where bitsandbytes is wrong.

bitsandbytes 0.50.2's CPU kernel dequantises matrices of several rows whose row length is not a multiple of 64 wrongly (it
restarts the blocks at each row). So the oracle for every shape is written out here from the format's definition, and the
error against the original weight must stay below what NF4 allows.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.nf4 import PackedWeight, pack, unpack_into, unpack_scales
from quant.sizes import UNPACK_CHUNK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_GAP = 0.1520  # half of NF4's widest gap (-1 to -0.6962), per unit of absmax


def random_weight(shape: tuple[int, int], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, so that a wrong block's scale shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape[0], 1, generator=generator) * 3 + 0.01
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def unpacked(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.full(packed.shape, torch.nan, dtype=dtype)
    assert unpack_into(packed, out) is out
    return out


def by_definition(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Two codes a byte, high half first; each block of consecutive elements has one scale; fp32, then rounded."""
    halves = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).view(-1).long()
    n = packed.shape[0] * packed.shape[1]
    scales = unpack_scales(packed).repeat_interleave(packed.block_elements)
    return (packed.code_map[halves[:n]] * scales[:n]).view(packed.shape).to(dtype)


def by_bitsandbytes(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    state = QuantState(
        absmax=unpack_scales(packed),
        shape=torch.Size(packed.shape),
        code=packed.code_map,
        dtype=dtype,
        blocksize=packed.block_elements,
        quant_type=packed.quant_type,
    )
    return dequantize_4bit(packed.codes.view(-1, 1), state)


def largest_error(packed: PackedWeight, weight: Tensor) -> float:
    """Error against the original, as a share of what NF4 allows (half a gap of the block's absmax + the scale's error)."""
    n = weight.numel()
    blocks = torch.nn.functional.pad(weight.float().view(-1), (0, -n % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    scale_error = (unpack_scales(packed) - absmax).abs()
    assert (scale_error <= 0.0075 * packed.nested_absmax.max() + 1e-6).all(), "8-bit scales: at most half of their gap"
    allowed = (HALF_GAP * absmax + scale_error).repeat_interleave(64)[:n] + 1e-6
    return ((unpacked(packed, torch.float32) - weight.float()).abs().view(-1) / allowed).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (128, 192), (2 * UNPACK_CHUNK // 512 + 3, 512)])
def test_unpacking_equals_bitsandbytes_bitwise(shape, dtype):
    packed = pack(random_weight(shape))
    ours = unpacked(packed, dtype)
    assert torch.equal(ours, by_bitsandbytes(packed, dtype))
    assert torch.equal(ours, by_definition(packed, dtype))


@settings(deadline=None, max_examples=80)
@given(rows=st.integers(1, 70), columns=st.integers(1, 150), dtype=st.sampled_from(DTYPES))
@example(rows=128, columns=96, dtype=torch.float32)  # whole blocks, but rows of one and a half
@example(rows=5, columns=96, dtype=torch.float32)  # the last block is not whole either
@example(rows=7, columns=9, dtype=torch.bfloat16)  # an odd number of elements
def test_every_shape_follows_the_definition_and_the_nf4_bound(rows, columns, dtype):
    weight = random_weight((rows, columns), seed=rows * 1000 + columns)
    packed = pack(weight)
    assert torch.equal(unpacked(packed, dtype), by_definition(packed, dtype))
    assert largest_error(packed, weight) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 64), (33, 65), (1100, 1024)])
def test_packing_equals_bitsandbytes_bitwise(shape, dtype):
    weight = random_weight(shape, dtype=dtype)
    packed = pack(weight)
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.absmax, state.absmax)
    assert torch.equal(packed.nested_absmax, state.state2.absmax)
    assert torch.equal(packed.offset, state.offset)
    assert torch.equal(packed.code_map, state.code)
    assert torch.equal(packed.nested_map, state.state2.code)
    assert (packed.dtype, packed.shape, packed.nested_block_elements) == (dtype, shape, state.state2.blocksize)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_other_forms_that_folders_hold(quant_type, block):
    """Scales in fp32 (no double quantisation), other block lengths, fp4."""
    codes, state = quantize_4bit(
        random_weight((16, 256)), blocksize=block, compress_statistics=False, quant_type=quant_type
    )
    packed = PackedWeight(
        codes.view(-1), state.absmax, state.code, (16, 256), torch.float32, block_elements=block, quant_type=quant_type
    )
    assert torch.equal(unpacked(packed, torch.float32), dequantize_4bit(codes, state))


def test_a_transposed_view_is_packed_by_its_own_rows():
    weight = random_weight((64, 128)).t()
    assert largest_error(pack(weight), weight.contiguous()) <= 1.0


def test_zeros_stay_zeros():
    assert torch.equal(unpacked(pack(torch.zeros(8, 64)), torch.float32), torch.zeros(8, 64))


def test_recorded_dtype_is_a_record_only():
    weight = random_weight((8, 64))
    assert pack(weight, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert torch.equal(unpacked(pack(weight, dtype=torch.bfloat16), torch.float32), unpacked(pack(weight), torch.float32))


def test_parts_equal_the_whole():
    """Rows and columns unpacked on their own are those of the whole matrix, bit for bit."""
    from quant.nf4 import unpack_part, unpack_scales

    packed = pack(torch.randn(96, 256))
    whole = unpack_into(packed, torch.empty(96, 256))
    scales = unpack_scales(packed)
    assert torch.equal(unpack_part(packed, scales, torch.empty(33, 256), rows=slice(7, 40)), whole[7:40])
    assert torch.equal(unpack_part(packed, scales, torch.empty(96, 128), columns=slice(64, 192)), whole[:, 64:192])


def test_packing_imports_no_compiler():
    """In a process of its own; what it packs is then what it is with the compiler."""
    code = (
        "import sys, torch; compiled = torch.compile\n"
        "from quant.nf4 import pack; torch.manual_seed(0)\n"
        "packed = pack(torch.randn(33, 65)); print(packed.codes.sum().item(), packed.absmax.sum().item())\n"
        "sys.exit('torch._inductor.compile_fx' in sys.modules or torch.compile is not compiled)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    packed = pack(torch.randn(33, 65))
    assert done.stdout.split() == [str(packed.codes.sum().item()), str(packed.absmax.sum().item())]
