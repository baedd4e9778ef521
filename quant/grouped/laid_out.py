"""A matrix as other programs quantise it, and its rows in blocks: each group of a row behind its scale and zero point.

Those formats keep codes, scales and zero points in tensors of their own, some of them column by column; here a row's bytes
lie side by side, so that a layer is moved, cut and unpacked as one of a GGUF file is (quant/gguf/weight.py). The rule: the
codes, scales and zero points stay what they are, bit for bit; the value of an element is (code - zero) * scale, rounded to
the dtype of the scale.

Shapes: O rows (outputs), I columns (inputs), G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.gguf.types import ORDER_SUFFIX, ORDERED, BlockType
from quant.grouped.kinds import FLOAT8, WIDTHS, block_type

SCALE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Grouped:
    """Codes (O, I) uint8 or float8_e4m3fn, scales (O, G) and zero points (O, G), which floating-point codes have not.

    `place_I`: where each column of the matrix stands among those of the codes, if not in its place.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None
    n_bits: int
    place_I: Tensor | None = None

    def laid_out(self, where: str) -> tuple[BlockType, Tensor]:
        """The block type, and the rows (O, bytes) in blocks. Raises FolderError for sizes that make no blocks."""
        n_rows, n_columns = self.codes_OI.shape
        n_groups = self.scales_OG.shape[1]
        code = WIDTHS[self.n_bits] if self.zeros_OG is not None else FLOAT8
        scale = SCALE_NAMES.get(self.scales_OG.dtype, str(self.scales_OG.dtype))
        kind = block_type(code, n_columns=n_columns, n_groups=n_groups, scale=scale, where=where)
        kind = kind if self.place_I is None else ORDERED[kind.name + ORDER_SUFFIX]
        elements = kind.block_elements
        n_blocks = n_columns // elements
        parts = [_bytes(self.scales_OG, n_blocks)]
        if self.zeros_OG is not None:
            size = self.scales_OG.element_size()
            parts.append(_bytes(self.zeros_OG.to(torch.int16 if size == 2 else torch.int32), n_blocks))
        codes = self.codes_OI.contiguous().view(torch.uint8).view(n_rows, n_blocks, elements)
        parts.append(_packed(codes, {"INT2": 2, "INT4": 4}.get(code, 8)))
        return kind, torch.cat(parts, dim=2).view(n_rows, n_blocks * kind.block_bytes)


def _bytes(values_OG: Tensor, n_blocks: int) -> Tensor:
    """The bytes (O, blocks, bytes of a number) of what each group has, once for each of its blocks."""
    repeated = values_OG.repeat_interleave(n_blocks // values_OG.shape[1], dim=1).contiguous()
    return repeated.view(torch.uint8).view(len(repeated), n_blocks, values_OG.element_size())


def _packed(codes: Tensor, n_bits: int) -> Tensor:
    """Codes (O, blocks, elements) with several in a byte: a byte's lowest bits are of the first part of the elements."""
    n_parts = 8 // n_bits
    width = codes.shape[2] // n_parts
    packed = codes[:, :, :width].clone()
    for part in range(1, n_parts):
        packed |= codes[:, :, part * width : (part + 1) * width] << (part * n_bits)
    return packed


def unpacked_words(words: Tensor, n_bits: int, *, dim: int) -> Tensor:
    """The codes (uint8) of int32 words that hold 32 / n_bits of them, the lowest bits first, along a dimension.

    3 bits: three words hold 32 codes, bit after bit.
    """
    if dim == 0:
        return unpacked_words(words.T, n_bits, dim=1).T
    if n_bits == 3:
        bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32)) & 1
        by_code = bits.reshape(len(words), -1, 3).to(torch.uint8)
        return by_code[:, :, 0] | by_code[:, :, 1] << 1 | by_code[:, :, 2] << 2
    mask = (1 << n_bits) - 1
    parts = [((words >> shift) & mask).to(torch.uint8) for shift in range(0, 32, n_bits)]
    return torch.stack(parts, dim=2).view(len(words), -1)
