"""One weight matrix in 4 bits: pack it, unpack it into a buffer that the caller reuses.

Packing is bitsandbytes' `quantize_4bit` (NF4, blocks of 64, double quantisation). Unpacking on CUDA is its kernel with an
`out` argument. On the CPU bitsandbytes 0.50.2 has no `out` form and allocates a result per call, nor has it one on every
Intel GPU, and on Apple's it copies a result, made by a kernel that it may fetch from a hub. So there unpacking is ours: a
256-entry table maps a byte to its pair of fp32 codes (on the CPU one 8-byte copy), in chunks that on the CPU stay in the L2
cache, then one multiplication by the block's scale. Measured on 2 cores (AMD EPYC, AVX512), 4096 x 4096 to fp32: 11.3 ms
against 24.1 ms for bitsandbytes, the same bits. The rule: `unpack_into` equals `bitsandbytes.functional.dequantize_4bit`
bit for bit; a test checks it. It is one form of `Packed` (packed.py). This file knows no files and no autograd.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant.sizes import BLOCK_ELEMENTS, NESTED_BLOCK_ELEMENTS, UNPACK_CHUNK, unpack_chunk

PACK_ELEMENTS = 1 << 18  # elements packed at a time: bitsandbytes' temporaries take up to 14 bytes an element


@dataclass(frozen=True)
class PackedWeight:
    """A matrix (out, in) in 4 bits. All tensors lie on one device.

    codes uint8 (n / 2,), the high half of a byte first; absmax uint8 (n / block,) when `nested_absmax` fp32 is there,
    else fp32; `code_map` fp32 (16,), `nested_map` fp32 (256,); `offset` fp32 scalar added to the unpacked absmax.
    `dtype` is what the folder records for dequantisation by other tools; ours goes to the compute dtype directly.
    """

    codes: Tensor
    absmax: Tensor
    code_map: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    offset: Tensor | None = None
    block_elements: int = BLOCK_ELEMENTS
    nested_block_elements: int = 256
    quant_type: str = "nf4"

    @property
    def device(self) -> torch.device:
        """The device of all the matrix' tensors."""
        return self.codes.device

    @property
    def n_bytes(self) -> int:
        """The bytes of the codes and scales; the code maps are shared by all matrices and left out."""
        nested = 0 if self.nested_absmax is None else self.nested_absmax.nbytes
        return self.codes.nbytes + self.absmax.nbytes + nested

    def scales(self) -> Tensor:
        """The fp32 absolute maximum of each block, (n / block,)."""
        return unpack_scales(self)

    def unpack_into(self, out: Tensor) -> Tensor:
        """Dequantise into `out`, as the function of that name does."""
        return unpack_into(self, out)

    def unpack_part(
        self, scales: Tensor | None, out: Tensor, *, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """Dequantise some rows, or some columns, as the function of that name does."""
        assert scales is not None  # those of `scales()`
        return unpack_part(self, scales, out, rows=rows, columns=columns)


def import_packing() -> None:
    """Import bitsandbytes, and not torch's compiler with it: for whoever needs it, or looks at what the process takes.

    When it is imported it wraps a few functions of its plain torch backend in `torch.compile`, which imports the compiler:
    2.6 s of a core and 42 MiB that the process keeps, where bitsandbytes alone takes 0.1 s and 3 MiB. None of them runs on
    a CPU or a CUDA device, which have kernels. On MPS they do run, and are compiled.
    """
    if "bitsandbytes" in sys.modules or torch.backends.mps.is_available():
        import bitsandbytes.functional

        return
    compiled = torch.compile
    vars(torch)["compile"] = _as_it_is
    try:
        import bitsandbytes.functional  # noqa: F401
    finally:
        vars(torch)["compile"] = compiled


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """`torch.compile` that compiles nothing."""
    return function if function is not None else _as_it_is


def pack(weight: Tensor, *, dtype: torch.dtype | None = None) -> PackedWeight:
    """Quantise a matrix (out, in) of any float dtype; `dtype` is what to record (default: that of the matrix)."""
    import_packing()
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    flat = weight.contiguous().view(-1)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // BLOCK_ELEMENTS), dtype=torch.float32, device=weight.device)
    for start in range(0, flat.numel(), PACK_ELEMENTS):
        part = flat[start : start + PACK_ELEMENTS]
        part_codes, state = quantize_4bit(part, blocksize=BLOCK_ELEMENTS, compress_statistics=False, quant_type="nf4")
        codes[start // 2 :][: part_codes.numel()] = part_codes.view(-1)
        absmax[start // BLOCK_ELEMENTS :][: state.absmax.numel()] = state.absmax
    offset = absmax.mean()
    nested_codes, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_ELEMENTS)
    return PackedWeight(
        codes=codes,
        absmax=nested_codes,
        code_map=state.code,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=dtype or weight.dtype,
        nested_absmax=nested.absmax,
        nested_map=nested.code,
        offset=offset,
        nested_block_elements=nested.blocksize,
    )


def unpack_scales(weight: PackedWeight) -> Tensor:
    """The fp32 absolute maximum of each block, (n / block,)."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_map is not None and weight.offset is not None  # the three come together
    if weight.codes.is_cuda:
        import_packing()  # it brings the operation
        # Its own function makes a QuantState first: 12 us of Python more, 18 times a layer.
        arguments = (weight.absmax, weight.nested_absmax, weight.nested_map, weight.nested_block_elements, torch.float32)
        scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(*arguments)
        return scales.add_(weight.offset)
    # The same arithmetic here, so that a run on a ready 4-bit folder never imports bitsandbytes.
    scales = torch.index_select(weight.nested_map, 0, weight.absmax.int())  # half the time of [], the same bits
    whole = scales.numel() // weight.nested_block_elements * weight.nested_block_elements
    n_whole = whole // weight.nested_block_elements
    scales[:whole].view(n_whole, weight.nested_block_elements).mul_(weight.nested_absmax[:n_whole].unsqueeze(1))
    if whole < scales.numel():
        scales[whole:].mul_(weight.nested_absmax[n_whole])
    return scales.add_(weight.offset)


def unpack_into(weight: PackedWeight, out: Tensor) -> Tensor:
    """Dequantise into `out` (out, in), contiguous, float32, bfloat16 or float16, and return it."""
    scales = unpack_scales(weight)
    if out.numel() % weight.block_elements or UNPACK_CHUNK * 2 % weight.block_elements:
        return _unpack_odd(weight, scales, out)
    return _unpack_codes(weight, weight.codes, scales, out)


def unpack_part(
    weight: PackedWeight, scales: Tensor, out: Tensor, *, rows: slice | None = None, columns: slice | None = None
) -> Tensor:
    """Dequantise some rows, or some columns, of a matrix whose quantisation blocks do not cross rows.

    `scales` are those of `unpack_scales`; `out` is contiguous; column bounds are multiples of the block size.
    """
    n_rows, n_columns = weight.shape
    codes = weight.codes.view(n_rows, n_columns // 2)
    scales = scales.view(n_rows, n_columns // weight.block_elements)
    if rows is not None:
        codes, scales = codes[rows], scales[rows]
    if columns is not None:
        codes = codes[:, columns.start // 2 : columns.stop // 2]
        scales = scales[:, columns.start // weight.block_elements : columns.stop // weight.block_elements]
    return _unpack_codes(weight, codes.reshape(-1), scales.reshape(-1), out)


def _unpack_codes(
    weight: PackedWeight, codes: Tensor, scales: Tensor, out: Tensor, *, on_cpu: bool | None = None
) -> Tensor:
    """Dequantise whole blocks; `codes` and `scales` are in the order of `out`'s elements. `on_cpu`: in the way of the CPU
    (default: where they lie)."""
    on_cpu = out.is_cpu if on_cpu is None else on_cpu
    if weight.codes.is_cuda:
        # The kernel reads on from the first element; the scales of a single column of blocks are a view with steps.
        operation, scales = torch.ops.bitsandbytes.dequantize_4bit.out, scales.contiguous()
        packed, form = codes.contiguous().view(-1, 1), (weight.block_elements, weight.quant_type)
        operation(packed, scales, *form, out.shape, out.dtype, out=out)
        return out
    flat, size = out.view(-1), unpack_chunk(on_cpu=on_cpu)
    pairs = _pair_table(tuple(weight.code_map.tolist())) if on_cpu else _pairs(weight.code_map)
    values = None
    if out.dtype != torch.float32:
        values = torch.empty(min(2 * size, flat.numel()), dtype=torch.float32, device=out.device)
    for start in range(0, codes.numel(), size):
        chunk = codes[start : start + size]
        first, last = 2 * start, 2 * (start + chunk.numel())
        target = flat[first:last] if values is None else values[: last - first]
        filled = target.view(torch.int64) if on_cpu else target.view(-1, 2)
        torch.index_select(pairs, 0, chunk.to(torch.int32), out=filled)
        block_scales = scales[first // weight.block_elements : last // weight.block_elements]
        target.view(-1, weight.block_elements).mul_(block_scales.view(-1, 1))
        if values is not None:
            flat[first:last].copy_(target)
    return out


@lru_cache(maxsize=4)
def _pair_table(code_map: tuple[float, ...]) -> Tensor:
    """A table (256,) int64 whose entry b is the two fp32 codes of byte b, high half first, as one 8-byte word."""
    code = torch.tensor(code_map, dtype=torch.float32)
    return _pairs(code).view(torch.int64).view(-1)


def _pairs(code: Tensor) -> Tensor:
    """The two fp32 codes of each byte (256, 2), high half first, on the device of the 16 codes, without a wait for it."""
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).contiguous()


def _unpack_odd(weight: PackedWeight, scales: Tensor, out: Tensor) -> Tensor:
    """Dequantise a size whose last block is not whole (no real model has one): each code times its block's scale.

    bitsandbytes' kernel is not used: 0.50.2 restarts the blocks at each row, and compiles with torch.compile for odd row
    lengths.
    """
    halves = torch.stack([weight.codes >> 4, weight.codes & 15], dim=1).view(-1)[: out.numel()]
    values = weight.code_map[halves.int()].mul_(scales.repeat_interleave(weight.block_elements)[: out.numel()])
    return out.copy_(values.view(out.shape))
