"""MXFP4 in two tensors: bitwise transformers' own conversion, whole, by rows and by columns; and what is damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quant.gguf.types import CPU_CHUNK
from quant.gguf.unpack import Scratch, new_scratch
from quant.headers import FolderError, read_headers
from quant.mxfp4.stacks import SCALES, cut_stacks
from quant.mxfp4.weight import Mxfp4Weight, mxfp4_on_disk, read_mxfp4

CPU = torch.device("cpu")
NAMES = [f"experts.{number}.down_proj.weight" for number in range(3)]


def random_parts(shape: tuple[int, int], *, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of a stack; every scale that is one, the smallest and the largest among them."""
    draw = torch.Generator().manual_seed(seed)
    sizes = (count, shape[0], shape[1] // 32)
    scales = torch.randint(0, 253, sizes, generator=draw, dtype=torch.uint8)
    scales[0, 0, :2] = torch.tensor([0, 252], dtype=torch.uint8)
    return torch.randint(0, 256, (*sizes, 16), generator=draw, dtype=torch.uint8), scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64), (CPU_CHUNK // 96 + 3, 96)])  # the second has more than a chunk
def test_it_is_transformers_conversion(dtype, shape):
    blocks, scales = random_parts(shape, count=1)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0].t()
    scratch = Scratch(new_scratch(CPU))
    weight = Mxfp4Weight(blocks.view(-1), scales.view(-1), shape, scratch)
    assert torch.equal(weight.unpack_into(torch.empty(shape, dtype=dtype)), expected)
    part = weight.unpack_part(None, torch.empty(3, shape[1], dtype=dtype), rows=slice(1, 4))
    assert torch.equal(part, expected[1:4])
    part = weight.unpack_part(None, torch.empty(shape[0], 32, dtype=dtype), columns=slice(32, 64))
    assert torch.equal(part, expected[:, 32:64])
    assert weight.n_bytes == shape[0] * shape[1] * 17 // 32


def stacks(folder, shape=(7, 64), **changes):
    blocks, scales = random_parts(shape)
    tensors = {"x_blocks": blocks, "x_scales": scales, **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    entries = read_headers(folder)
    return blocks, scales, cut_stacks(entries["x_blocks"], entries.get("x_scales"), shape, NAMES)


def test_a_stack_is_cut_by_positions(tmp_path):
    blocks, scales, entries = stacks(tmp_path)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    for number, name in enumerate(NAMES):
        assert entries[name].shape == (7, 64) and entries[name + SCALES].shape == (7, 2)
        assert torch.equal(read_mxfp4(entries, name), expected[number].t())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_scales": None}, r"'x_scales' is missing.*\[3, 7, 2\]"),
        ({"x_scales": torch.zeros(3, 7, 3, dtype=torch.uint8)}, r"'x_scales' is U8 \[3, 7, 3\]"),
        ({"x_blocks": torch.zeros(3, 7, 2, 16)}, r"'x_blocks' is F32"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, changes, words):
    with pytest.raises(FolderError, match=words):
        stacks(tmp_path, **changes)


@pytest.mark.parametrize(("value", "words"), [(255, "not a number"), (253, r"stands for 2\^126")])
def test_damaged_scales(tmp_path, value, words):
    _, scales = random_parts((7, 64))
    scales[2, 6, 1] = value
    entries = stacks(tmp_path, x_scales=scales)[2]
    mxfp4_on_disk(entries, NAMES[1])
    with pytest.raises(FolderError, match=f"damaged.*{words}"):
        mxfp4_on_disk(entries, NAMES[2])
    with pytest.raises(FolderError, match="no scales"):
        mxfp4_on_disk({NAMES[0]: replace(entries[NAMES[0]])}, NAMES[0])
