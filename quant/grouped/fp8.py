"""FP8 with a scale for each square of a matrix, as DeepSeek and Qwen publish it: `X.weight` float8_e4m3fn and its scales.

`X.weight_scale_inv` (O / 128, I / 128): what a square is multiplied with, in spite of its name. Read: transformers 5.23,
integrations/finegrained_fp8.py. Scales of activations are for inference alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant.grouped.laid_out import Grouped
from quant.headers import FolderError


def read(part: Callable[[str], Tensor | None], config: dict[str, Any], *, where: str) -> Grouped:
    """One matrix; `part` gives a tensor by the last word of its name. Raises FolderError."""
    weight, scales = part("weight"), part("weight_scale_inv")
    n_rows, n_columns = config["weight_block_size"]
    if weight is None or weight.dtype != torch.float8_e4m3fn or scales is None or weight.ndim != 2:
        raise FolderError(f"{where}: is no float8_e4m3fn matrix with weight_scale_inv")
    if scales.shape != (-(-weight.shape[0] // n_rows), -(-weight.shape[1] // n_columns)) or weight.shape[1] % n_columns:
        raise FolderError(f"{where}: weight_scale_inv {tuple(scales.shape)} is not for {tuple(weight.shape)} by {n_rows}")
    scales_OG = scales.float().repeat_interleave(n_rows, dim=0)[: len(weight)]
    return Grouped(weight, scales_OG.contiguous(), None, 8)
