"""GGUF blocks unpacked in torch against the `gguf` package, bit for bit, from blocks of random bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from quant.gguf.types import BY_NUMBER, CPU_CHUNK, OTHER_NAMES, TYPES, BlockType, scratch_bytes
from quant.gguf.unpack import Scratch, new_scratch
from quant.gguf.weight import GgufLayout, GgufWeight
from quant.headers import TensorEntry

CPU = torch.device("cpu")
N_COLUMNS = 1024
SCRATCH = Scratch(new_scratch(CPU))
PACKED = [one for one in TYPES.values() if not one.is_plain]


def random_weight(kind: BlockType, n_rows: int, *, seed: int = 0) -> GgufWeight:
    """Blocks of random bytes: every code, every scale, also those that are no number."""
    generator = torch.Generator().manual_seed(seed)
    n_bytes = kind.n_bytes((n_rows, N_COLUMNS))
    blocks = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator)
    return GgufWeight(blocks, (n_rows, N_COLUMNS), kind, SCRATCH)


def by_gguf(weight: GgufWeight) -> Tensor:
    data = weight.blocks.numpy().reshape(weight.shape[0], -1)
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(data, GGMLQuantizationType(weight.type.number)).copy())


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Bit for bit, signs of zeros included; a NaN is a NaN."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0, 8.0, 9.0).view(torch.int32), theirs.nan_to_num(7.0, 8.0, 9.0).view(torch.int32))


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_unpacked_as_the_gguf_package_does(name):
    weight = random_weight(TYPES[name], 200)  # more than one chunk, the last one not whole
    assert weight.shape[0] * N_COLUMNS > CPU_CHUNK and weight.shape[0] * N_COLUMNS % CPU_CHUNK
    out, expected = torch.empty(weight.shape), by_gguf(weight)
    assert weight.unpack_into(out) is out
    assert expected.isfinite().float().mean() > 0.9 and expected.nan_to_num(0, 0, 0).unique().numel() > 300
    assert_same_bits(out, expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = weight.unpack_into(torch.empty(weight.shape, dtype=dtype))
        assert_same_bits(half.float(), expected.to(dtype).float())


@pytest.mark.parametrize("name", TYPES)
def test_rows_and_columns_are_those_of_the_whole(name):
    weight = random_weight(TYPES[name], 150, seed=1)
    whole = weight.unpack_into(torch.empty(weight.shape))
    assert_same_bits(weight.unpack_part(None, torch.empty(33, N_COLUMNS), rows=slice(7, 40)), whole[7:40])
    columns = weight.unpack_part(None, torch.empty(150, 512), columns=slice(256, 768))
    assert_same_bits(columns, whole[:, 256:768].contiguous())


def test_every_exponent_of_mxfp4():
    kind = TYPES["MXFP4"]
    blocks = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 17)
    blocks[:, 1:] = torch.arange(16, dtype=torch.uint8) * 17 % 251
    weight = GgufWeight(blocks.view(-1), (256, 32), kind, SCRATCH)
    assert_same_bits(weight.unpack_into(torch.empty(256, 32)), by_gguf(weight))


def test_the_sizes_are_those_of_ggml():
    for kind in TYPES.values():
        theirs = GGMLQuantizationType(kind.number)
        assert theirs.name == kind.name and GGML_QUANT_SIZES[theirs] == (kind.block_elements, kind.block_bytes)
        assert kind.n_bytes((3, 512)) == 3 * 512 // kind.block_elements * kind.block_bytes
    named = {**OTHER_NAMES, **{number: kind.name for number, kind in BY_NUMBER.items()}}
    assert named == {int(theirs): theirs.name for theirs in GGMLQuantizationType}


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_unpacking_allocates_nothing(kind):
    from lopt_edge.run.watch.tracker import MemoryTracker

    weight, out, half = random_weight(kind, 200), torch.empty(200, N_COLUMNS), torch.empty(200, 512, dtype=torch.bfloat16)
    with MemoryTracker() as tracker:
        tracker.watch([weight.blocks, out, half, SCRATCH.flat])
        tracker.start_peak()
        before = tracker.live_bytes
        weight.unpack_into(out)
        weight.unpack_part(None, half, columns=slice(512, 1024))
    assert tracker.peak_bytes == before
    assert len(SCRATCH.flat) == scratch_bytes(on_cpu=True)


def test_a_matrix_is_put_together_from_its_part():
    kind = TYPES["Q4_K"]
    weight = random_weight(kind, 4)
    entry = TensorEntry("w", Path("x.gguf"), kind.name, weight.shape, 0, weight.n_bytes)
    layout, known = GgufLayout({"": entry}, weight.shape, kind), {}
    shared = layout.shared(CPU, known)
    again = layout.assemble({"": weight.blocks, **layout.shared(CPU, known)})
    assert again.scratch.flat is shared["scratch"] and again.block_elements == layout.block_elements == 256
    assert_same_bits(again.unpack_into(torch.empty(weight.shape)), weight.unpack_into(torch.empty(weight.shape)))
    assert (again.n_bytes, again.device, again.scales()) == (4 * 4 * 144, CPU, None)
