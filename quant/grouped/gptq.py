"""GPTQ: integer codes of 2, 3, 4 or 8 bits in groups of inputs, packed in words along the inputs, a matrix as `X.qweight`.

`X.qweight` (I * bits / 32, O) int32, `X.qzeros` (G, O * bits / 32) int32, `X.scales` (G, O), `X.g_idx` (I,) the group of
each input. Two versions: in the first, which most folders have (`checkpoint_format` "gptq"), zero points are stored less
one. Read: AutoGPTQ's and GPTQModel's torch kernels, `checkpoint_format` in their quantization_config.

Act-order (`desc_act`): groups are of inputs of like importance, so `g_idx` is out of order. The inputs are laid out group
by group, those of a group in their own order, and where each one lies stands beside the blocks. A `g_idx` that gives a
group more or fewer inputs than its share is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant.grouped.kinds import is_ordered
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
    by_group_I = _by_group(part("g_idx"), n_inputs, n_groups, is_ordered=is_ordered(config, n_groups), where=where)
    zeros_GO = unpacked_words(zero_words, n_bits, dim=1).int()
    zeros_GO += config.get("checkpoint_format", "gptq") == "gptq"
    codes_OI, place_I = unpacked_words(words, n_bits, dim=0).T, None
    if by_group_I is not None:
        codes_OI, place_I = codes_OI[:, by_group_I], by_group_I.argsort().int()
    return Grouped(codes_OI.contiguous(), scales_GO.T.contiguous(), zeros_GO.T.contiguous(), n_bits, place_I)


def _by_group(index_I: Tensor | None, n_inputs: int, n_groups: int, *, is_ordered: bool, where: str) -> Tensor | None:
    """The inputs group by group; None where they lie so. Raises FolderError for groups that are not of one size."""
    size = n_inputs // n_groups
    expected_I = torch.arange(n_inputs) // size
    if index_I is None:
        return torch.arange(n_inputs) if is_ordered else None
    groups_I = index_I.long()
    if groups_I.shape != expected_I.shape or not torch.equal(groups_I.sort().values, expected_I):
        raise FolderError(f"{where}: g_idx does not put {size} of {n_inputs} inputs into each of {n_groups} groups")
    if not is_ordered:
        if not torch.equal(groups_I, expected_I):
            raise FolderError(f"{where}: g_idx is out of order, and the config says no desc_act (act-order)")
        return None
    return groups_I.argsort(stable=True)
