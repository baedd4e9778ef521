"""compressed-tensors (llm-compressor, vLLM): weights in integers of 4 or 8 bits, or in float8.

Three of its formats: `pack-quantized`: `X.weight_packed` (O, I * bits / 32) int32, codes with 2^(bits - 1) added,
`X.weight_zero_point` packed along the outputs; `int-quantized`: `X.weight` int8; `float-quantized`: `X.weight`
float8_e4m3fn. Each with `X.weight_scale` (O, G), (O, 1) or (1,). Read: compressed_tensors 0.20.1,
compressors/pack_quantized/helpers.py, quantization/lifecycle/forward_helpers.py (`_dequantize`).

Not here: sparsity, act-order, and float4 (nvfp4, mxfp4). What a config says of activations is for inference alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant.grouped.laid_out import Grouped, unpacked_words
from quant.headers import FolderError


def read(part: Callable[[str], Tensor | None], config: dict[str, Any], *, where: str) -> Grouped:
    """One matrix; `part` gives a tensor by the last word of its name. Raises FolderError."""
    scales = part("weight_scale")
    packed, plain, shape = part("weight_packed"), part("weight"), part("weight_shape")
    if scales is None or (packed is None and plain is None):
        raise FolderError(f"{where}: weight_scale or the weight is missing")
    if part("weight_g_idx") is not None:
        raise FolderError(f"{where}: act-order with groups out of order cannot be read; use a build without it")
    if packed is None:
        assert plain is not None
        scales_OG = _of_rows(scales, len(plain))
        if plain.dtype == torch.float8_e4m3fn:
            return Grouped(plain, scales_OG, None, 8)
        if plain.dtype != torch.int8:
            raise FolderError(f"{where}: has dtype {plain.dtype} beside scales, known are int8 and float8_e4m3fn")
        zero = part("weight_zero_point")
        zeros_OG = torch.zeros(scales_OG.shape, dtype=torch.int32) if zero is None else _of_rows(zero, len(plain)).int()
        return Grouped((plain.int() + 128).to(torch.uint8), scales_OG, zeros_OG + 128, 8)
    if shape is None or shape.numel() != 2:
        raise FolderError(f"{where}: weight_shape is missing")
    n_outputs, n_inputs = shape.tolist()
    n_bits = 32 * packed.shape[1] // n_inputs if n_inputs > 0 else 0
    if n_bits not in (4, 8) or packed.shape != (n_outputs, n_inputs * n_bits // 32):
        raise FolderError(f"{where}: weight_packed {tuple(packed.shape)} is not {n_outputs} x {n_inputs} in 4 or 8 bits")
    scales_OG, zero = _of_rows(scales, n_outputs), part("weight_zero_point")
    zeros_OG = torch.full(scales_OG.shape, 1 << (n_bits - 1), dtype=torch.int32)
    if zero is not None and zero.dtype == torch.int32:
        zeros_OG = unpacked_words(zero, n_bits, dim=0)[:n_outputs].int()
    elif zero is not None:
        zeros_OG += _of_rows(zero, n_outputs).int()
    if zeros_OG.shape != scales_OG.shape:
        raise FolderError(f"{where}: weight_zero_point and weight_scale do not belong together")
    return Grouped(unpacked_words(packed, n_bits, dim=1), scales_OG, zeros_OG, n_bits)


def _of_rows(values: Tensor, n_rows: int) -> Tensor:
    """What a matrix has one of, or one of for each row, or for each group of a row: as (rows, groups)."""
    found = values.view(1, 1) if values.numel() == 1 else values.view(n_rows, -1)
    return found.expand(n_rows, -1).contiguous()
