"""GPTQ: integer codes of 2, 3, 4 or 8 bits in groups of inputs, packed in words along the inputs, a matrix as `X.qweight`.

`X.qweight` (I * bits / 32, O) int32, `X.qzeros` (G, O * bits / 32) int32, `X.scales` (G, O), `X.g_idx` (I,) the group of
each input. Two versions: in the first, which most folders have (`checkpoint_format` "gptq"), zero points are stored less
one. Read: AutoGPTQ's and GPTQModel's torch kernels, `checkpoint_format` in their quantization_config.

Not here: act-order whose groups are not consecutive (`desc_act` with a `g_idx` out of order), which blocks cannot hold.
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
    words, zero_words, scales_GO = part("qweight"), part("qzeros"), part("scales")
    if words is None or zero_words is None or scales_GO is None:
        raise FolderError(f"{where}: qweight, qzeros or scales is missing")
    n_bits, (n_groups, n_outputs) = config["bits"], scales_GO.shape
    n_inputs = words.shape[0] * 32 // n_bits
    if words.shape[1] != n_outputs or zero_words.shape != (n_groups, n_outputs * n_bits // 32) or n_inputs % n_groups:
        raise FolderError(f"{where}: qweight, qzeros and scales do not belong together (is the group size right?)")
    order_I = part("g_idx")
    if order_I is not None and not torch.equal(order_I.long(), torch.arange(n_inputs) // (n_inputs // n_groups)):
        raise FolderError(f"{where}: act-order (desc_act) with groups out of order cannot be read; use a build without it")
    zeros_GO = unpacked_words(zero_words, n_bits, dim=1).int()
    zeros_GO += config.get("checkpoint_format", "gptq") == "gptq"
    codes_OI = unpacked_words(words, n_bits, dim=0).T
    return Grouped(codes_OI.contiguous(), scales_GO.T.contiguous(), zeros_GO.T.contiguous(), n_bits)
