"""AWQ in its versions `gemm` and `gemv`: codes of 4 bits in groups of inputs, packed in words, as `X.qweight`.

gemm: `X.qweight` (I, O / 8) int32, `X.qzeros` (G, O / 8) int32, `X.scales` (G, O) float16. The eight codes of a word are of
the outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on. Read: AutoAWQ's awq/utils/packing_utils.py.
gemv: `X.qweight` (O, I / 8), `X.qzeros` (O, W), `X.scales` (O, 8 W), in their order; W words hold G groups and padding
behind them, and the config says how many inputs a group has. Read: AutoAWQ's awq/modules/linear/gemv.py.

Not here: the versions gemv_fast, marlin and exllama, whose words lie otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quant.grouped.kinds import awq_group, is_gemv
from quant.grouped.laid_out import Grouped, unpacked_words
from quant.headers import FolderError

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 to 7 among the codes of a word


def read(part: Callable[[str], Tensor | None], config: dict[str, Any], *, where: str) -> Grouped:
    """One matrix; `part` gives a tensor by the last word of its name. Raises FolderError."""
    words, zero_words, scales_GO = part("qweight"), part("qzeros"), part("scales")
    if words is None or zero_words is None or scales_GO is None:
        raise FolderError(f"{where}: qweight, qzeros or scales is missing")
    if is_gemv(config):
        return _read_gemv((words, zero_words, scales_GO), config, where)
    n_groups, n_outputs = scales_GO.shape
    if words.shape[1] * 8 != n_outputs or zero_words.shape != (n_groups, words.shape[1]) or len(words) % n_groups:
        raise FolderError(f"{where}: qweight, qzeros and scales do not belong together (is the group size right?)")
    zeros_GO = _in_order(zero_words).int()
    return Grouped(_in_order(words).T.contiguous(), scales_GO.T.contiguous(), zeros_GO.T.contiguous(), 4)


def _read_gemv(tensors: tuple[Tensor, Tensor, Tensor], config: dict[str, Any], where: str) -> Grouped:
    words, zero_words, scales_OG = tensors
    n_columns, size = words.shape[1] * 8, awq_group(config)
    n_groups, beyond = divmod(n_columns, n_columns if size == -1 else size)
    is_whole = zero_words.shape == (len(words), scales_OG.shape[1] // 8) and len(scales_OG) == len(words)
    if beyond or not is_whole or scales_OG.shape[1] < n_groups:
        raise FolderError(f"{where}: qweight, qzeros and scales do not belong together (is the group size right?)")
    zeros_OG = unpacked_words(zero_words, 4, dim=1)[:, :n_groups].int()
    return Grouped(unpacked_words(words, 4, dim=1), scales_OG[:, :n_groups].contiguous(), zeros_OG.contiguous(), 4)


def _in_order(words: Tensor) -> Tensor:
    """The codes of words in the order of their outputs."""
    codes = unpacked_words(words, 4, dim=1).view(len(words), -1, 8)
    return codes[:, :, list(PLACES)].reshape(len(words), -1)
