"""Blocks of GGUF, and of our own groups, unpacked in torch, on any device: the arithmetic of each type.

The rule: in fp32 the result equals the `gguf` package's `dequantize` bit for bit (tests/quant/gguf/test_unpack.py), so each
product and each sum is rounded where it rounds there, and none is fused. The formats are ggml's block structs
(ggml-common.h). Every temporary is a piece of the caller's `Scratch`; nothing is allocated here.

Shapes: n blocks; codes are bytes, `out` (n, elements of a block) is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant.gguf.types import (
    ALIGNMENT,
    BLOCK_TYPES,
    CODE_BITS,
    GROUPED,
    ORDER_SUFFIX,
    SCALE_BYTES,
    TABLE_BYTES,
    TABLES_BYTES,
    scratch_bytes,
)

# IQ4_NL and IQ4_XS: ggml's kvalues_iq4nl. MXFP4: twice the values of the OCP format E2M1; its scale is half as large.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
TABLES = (IQ4_VALUES, MXFP4_VALUES)
SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def new_scratch(device: torch.device) -> Tensor:
    """The flat buffer of a `Scratch`, with the tables at its beginning."""
    n_bytes = scratch_bytes(on_cpu=torch.empty(0, device=device).is_cpu)
    flat = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    pairs = flat[: len(TABLES) * TABLE_BYTES].view(torch.float32).view(len(TABLES), 256, 2)
    for values, target in zip(TABLES, pairs, strict=True):
        codes = torch.tensor(values, dtype=torch.float32)  # entry b: the values of byte b's low half, and of its high one
        target.copy_(torch.stack([codes.repeat(16), codes.repeat_interleave(16)], dim=1))
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1  # entry b: its bits as eight bytes of 0 or 16
    flat[len(TABLES) * TABLE_BYTES : TABLES_BYTES].copy_((16 * bits).to(torch.uint8).view(-1))
    return flat


class Scratch:
    """A buffer of `new_scratch` in which unpacking works: pieces are taken from it, and all given back at once."""

    def __init__(self, flat: Tensor) -> None:
        self.flat, self.position = flat, TABLES_BYTES

    def clear(self) -> None:
        """Give all pieces back."""
        self.position = TABLES_BYTES

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised piece. Raises RuntimeError where none is left, which no size that a model can have makes."""
        n_elements = 1
        for side in shape:
            n_elements *= side
        start, end = self.position, self.position + n_elements * dtype.itemsize
        if end > len(self.flat):
            raise RuntimeError("unpacking asks for more scratch than SCRATCH_PER_ELEMENT allows")
        self.position = -(-end // ALIGNMENT) * ALIGNMENT
        return self.flat[start:end].view(dtype).view(shape)

    def pairs(self, values: tuple[int, ...]) -> Tensor:
        """The table (256,) int64 of pairs of fp32, one word each."""
        start = TABLES.index(values) * TABLE_BYTES
        return self.flat[start : start + TABLE_BYTES].view(torch.int64)

    @property
    def fifth_bits(self) -> Tensor:
        """The table (256,) int64 of a byte's bits, each 16 or 0 in a byte of its own."""
        return self.flat[len(TABLES) * TABLE_BYTES : TABLES_BYTES].view(torch.int64)


Unpack = Callable[[Tensor, Tensor, Scratch], None]


def unpack_blocks(type_name: str, blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    """Unpack blocks (n, bytes of a block) into `out` (n, elements of a block), fp32."""
    UNPACK[type_name](blocks, out, scratch)


def _unpack_grouped(type_name: str, blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    """Unpack blocks of `GROUPED`: (code - zero) * scale, rounded to the scale's dtype as the formats' own kernels do."""
    code, _, scale = type_name.split("_")
    dtype, size = SCALE_DTYPES[scale], SCALE_BYTES[scale]
    scales = scratch.take((len(blocks), 1), torch.float32).copy_(blocks[:, :size].view(dtype))
    if code == "FP8":
        out.copy_(blocks[:, size:].view(torch.float8_e4m3fn))
    else:
        n_bits, codes = CODE_BITS[code], _split(blocks, 2 * size, 1, blocks.shape[1] - 2 * size)
        out.copy_(codes.flatten(1) if n_bits == 8 else _codes(codes, n_bits, scratch).flatten(1))
        zeros = blocks[:, size : 2 * size].view(torch.int16 if size == 2 else torch.int32)
        out.sub_(scratch.take((len(blocks), 1), torch.float32).copy_(zeros))
    out.mul_(scales)
    if size == 2:
        out.copy_(scratch.take(tuple(out.shape), dtype).copy_(out))


def _float(blocks: Tensor, start: int, scratch: Scratch) -> Tensor:
    """The half-precision number at a byte of each block, as fp32 (n, 1)."""
    return scratch.take((len(blocks), 1), torch.float32).copy_(blocks[:, start : start + 2].view(torch.float16))


def _bits(source: Tensor, shift: int, mask: int, out: Tensor) -> Tensor:
    """The bits of `mask` of each byte shifted right, into `out`."""
    if not shift:
        return torch.bitwise_and(source, mask, out=out)
    torch.bitwise_right_shift(source, shift, out=out)
    return out if mask == 255 >> shift else out.bitwise_and_(mask)


def _codes(source: Tensor, n_bits: int, scratch: Scratch) -> Tensor:
    """The codes (n, groups, 8 / n_bits, width) of bytes (n, groups, width), the lowest bits first.

    Four bytes are shifted and masked as one word, side by side: a loop over short rows costs more than its arithmetic.
    """
    n, groups, width = source.shape
    parts, mask = 8 // n_bits, 0x01010101 * ((1 << n_bits) - 1)
    codes = scratch.take((n, groups, parts, width), torch.uint8)
    words = scratch.take((n, groups, width), torch.uint8).copy_(source).view(-1).view(torch.int32)
    plane = scratch.take(tuple(words.shape), torch.int32)
    for part in range(parts):
        torch.bitwise_right_shift(words, part * n_bits, out=plane)
        codes[:, :, part].copy_(plane.bitwise_and_(mask).view(torch.uint8).view(n, groups, width))
    return codes


def _split(source: Tensor, first: int, groups: int, width: int) -> Tensor:
    """The bytes (n, groups, width) of each block from byte `first` on."""
    some = source[:, first : first + groups * width]
    return some.as_strided((len(some), groups, width), (some.stride(0), width, 1))


def _q4_0(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    out.copy_(_codes(_split(blocks, 2, 1, 16), 4, scratch).flatten(1)).sub_(8).mul_(_float(blocks, 0, scratch))


def _q4_1(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    out.copy_(_codes(_split(blocks, 4, 1, 16), 4, scratch).flatten(1))
    out.mul_(_float(blocks, 0, scratch)).add_(_float(blocks, 2, scratch))


def _with_fifth_bit(blocks: Tensor, first: int, scratch: Scratch) -> Tensor:
    """The codes (n, 32) of 5 bits: 4 bytes with the highest one of each element from `first` on, then the others."""
    n = len(blocks)
    codes = _codes(_split(blocks, first + 4, 1, 16), 4, scratch).view(n, 32)
    index = scratch.take((n, 4), torch.int32).copy_(blocks[:, first : first + 4]).view(-1)
    high = scratch.take((4 * n,), torch.int64)
    torch.index_select(scratch.fifth_bits, 0, index, out=high)  # byte j, bit i is of element 8 j + i
    return codes.bitwise_or_(high.view(torch.uint8).view(n, 32))


def _q5_0(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    out.copy_(_with_fifth_bit(blocks, 2, scratch)).sub_(16).mul_(_float(blocks, 0, scratch))


def _q5_1(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    out.copy_(_with_fifth_bit(blocks, 4, scratch)).mul_(_float(blocks, 0, scratch)).add_(_float(blocks, 2, scratch))


def _q8_0(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_float(blocks, 0, scratch))


def _scaled(codes: Tensor, out: Tensor, scales: Tensor, least: Tensor | None = None) -> None:
    """Put codes times scale, less `least` where there is one, into `out`; both (n, groups) in fp32."""
    grouped = out.view(*scales.shape, -1)
    grouped.copy_(codes.view(grouped.shape)).mul_(scales.unsqueeze(2))
    if least is not None:
        grouped.sub_(least.unsqueeze(2))


def _q2_k(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    packed, n = blocks[:, :16], len(blocks)
    part = scratch.take((n, 16), torch.uint8)
    scales, least = (scratch.take((n, 16), torch.float32) for _ in range(2))
    scales.copy_(_bits(packed, 0, 15, part)).mul_(_float(blocks, 80, scratch))
    least.copy_(_bits(packed, 4, 15, part)).mul_(_float(blocks, 82, scratch))
    _scaled(_codes(_split(blocks, 16, 2, 32), 2, scratch), out, scales, least)


def _q3_k(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    n = len(blocks)
    codes = _codes(_split(blocks, 32, 2, 32), 2, scratch).view(n, 8, 32)
    high = _codes(_split(blocks, 0, 1, 32), 1, scratch).view(n, 8, 32)
    codes.add_(high.bitwise_left_shift_(2))  # a set bit means that nothing is taken off: code + 4 bit - 4
    low = _codes(_split(blocks, 96, 1, 8), 4, scratch).view(n, 16)
    low.bitwise_or_(_codes(_split(blocks, 104, 1, 4), 2, scratch).view(n, 16).bitwise_left_shift_(4))
    scales = scratch.take((n, 16), torch.float32).copy_(low).sub_(32).mul_(_float(blocks, 108, scratch))
    grouped = out.view(n, 16, 16)
    grouped.copy_(codes.view(n, 16, 16)).sub_(4).mul_(scales.unsqueeze(2))


def _scales_and_least(blocks: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The scales and minima (n, 8) of Q4_K and Q5_K: 6 bits each, in 12 bytes from byte 4 on.

    Bytes 0-3 hold the first four scales and the highest two bits of the last four, 4-7 the same of the minima, 8-11 the
    lowest four bits of the last four scales (low halves) and minima (high halves).
    """
    n = len(blocks)
    found = scratch.take((2, n, 8), torch.uint8)
    part = scratch.take((n, 4), torch.uint8)
    for which, start in enumerate((4, 8)):
        _bits(blocks[:, start : start + 4], 0, 63, found[which, :, :4])
        _bits(blocks[:, 12:16], 4 * which, 15, found[which, :, 4:])
        found[which, :, 4:].bitwise_or_(_bits(blocks[:, start : start + 4], 2, 0x30, part))
    scales, least = (scratch.take((n, 8), torch.float32).copy_(one) for one in found)
    return scales.mul_(_float(blocks, 0, scratch)), least.mul_(_float(blocks, 2, scratch))


def _q4_k(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    scales, least = _scales_and_least(blocks, scratch)
    _scaled(_codes(_split(blocks, 16, 4, 32), 4, scratch), out, scales, least)


def _q5_k(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    n = len(blocks)
    scales, least = _scales_and_least(blocks, scratch)
    codes = _codes(_split(blocks, 48, 4, 32), 4, scratch).view(n, 8, 32)
    high = _codes(_split(blocks, 16, 1, 32), 1, scratch).view(n, 8, 32)
    _scaled(codes.bitwise_or_(high.bitwise_left_shift_(4)), out, scales, least)


def _q6_k(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    n = len(blocks)
    codes = _codes(_split(blocks, 0, 2, 64), 4, scratch).view(n, 8, 32)
    high = _codes(_split(blocks, 128, 2, 32), 2, scratch).view(n, 8, 32)
    codes.bitwise_or_(high.bitwise_left_shift_(4))
    scales = scratch.take((n, 16), torch.float32).copy_(blocks[:, 192:208].view(torch.int8))
    scales.mul_(_float(blocks, 208, scratch))
    grouped = out.view(n, 16, 16)
    grouped.copy_(codes.view(n, 16, 16)).sub_(32).mul_(scales.unsqueeze(2))


def _looked_up(source: Tensor, values: tuple[int, ...], out: Tensor, scratch: Scratch) -> Tensor:
    """The values of 4-bit codes (n, groups, 16 bytes) in `out` (n, groups, 2, 16): low halves first."""
    n, groups, width = source.shape
    index = scratch.take((n, groups, width), torch.int32).copy_(source).view(-1)
    pairs = scratch.take((n * groups * width,), torch.int64)
    torch.index_select(scratch.pairs(values), 0, index, out=pairs)
    return out.copy_(pairs.view(torch.float32).view(n, groups, width, 2).transpose(2, 3))


def _iq4_nl(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    _looked_up(_split(blocks, 2, 1, 16), IQ4_VALUES, out.view(-1, 1, 2, 16), scratch)
    out.mul_(_float(blocks, 0, scratch))


def _iq4_xs(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    n = len(blocks)
    low = scratch.take((n, 4, 2), torch.uint8)
    for half in range(2):
        _bits(blocks[:, 4:8], 4 * half, 15, low[:, :, half])
    high = scratch.take((n, 2, 4), torch.uint8)
    for part in range(4):
        _bits(blocks[:, 2:4], 2 * part, 3, high[:, :, part])
    low.view(n, 8).bitwise_or_(high.bitwise_left_shift_(4).view(n, 8))
    scales = scratch.take((n, 8), torch.float32).copy_(low.view(n, 8)).sub_(32).mul_(_float(blocks, 0, scratch))
    _looked_up(_split(blocks, 8, 8, 16), IQ4_VALUES, out.view(n, 8, 2, 16), scratch)
    out.view(n, 8, 32).mul_(scales.unsqueeze(2))


def powers_of_two(exponents: Tensor, scratch: Scratch) -> Tensor:
    """Half of 2^(e - 127) of bytes e, in fp32.

    The exponent field is e - 1; for e of 0 and 1 that is a subnormal number, 2^-128 and 2^-127.
    """
    shape = tuple(exponents.shape)
    exponent = scratch.take(shape, torch.int32).copy_(exponents)
    small = scratch.take(shape, torch.int32).copy_(exponent).clamp_(max=1).add_(1)
    bits = exponent.sub_(1).clamp_(min=0).bitwise_left_shift_(23)
    small.bitwise_left_shift_(21)
    is_small = scratch.take(shape, torch.bool)
    torch.eq(bits, 0, out=is_small)
    return torch.where(is_small, small, bits, out=bits).view(torch.float32)


def _mxfp4(blocks: Tensor, out: Tensor, scratch: Scratch) -> None:
    _looked_up(_split(blocks, 1, 1, 16), MXFP4_VALUES, out.view(-1, 1, 2, 16), scratch)
    out.mul_(powers_of_two(blocks[:, :1], scratch))


UNPACK: dict[str, Unpack] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
UNPACK |= {name: partial(_unpack_grouped, name) for name in GROUPED}
UNPACK |= {f"{name}{ORDER_SUFFIX}": UNPACK[name] for name in GROUPED}
assert set(UNPACK) == {name for name, one in BLOCK_TYPES.items() if not one.is_plain}
