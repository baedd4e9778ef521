"""One chunk of the vocabulary in the online softmax of the task loss (run/step/losses.py has the formula), in one kernel.

A program has one token. It reads its scores of the chunk twice: for the greatest, then for the sum of exp(l - m), and
leaves those weights in the place of the scores, times the slope of a soft cap where there is one. So no fp32 copy of the
scores is made. What is carried from chunk to chunk stands in five rows of one fp32 tensor, a column for each token: the
greatest score so far, the sum, the target's score and its slope, and the factor by which sums over earlier chunks shrink.

The target's score is read before any weight is written, and a barrier lies between.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # scores at a time
ROWS = 5  # of what is carried


@triton.jit
def _score(raw, factor, cap, CAPPED: tl.constexpr):
    """The logit of a raw product, and the slope of its cap."""
    scaled = raw.to(tl.float32) * factor
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * scaled / cap) - 1.0  # tanh
        return cap * bent, 1.0 - bent * bent
    return scaled, scaled * 0.0 + 1.0


@triton.jit(do_not_specialize=["n_tokens", "start"])
def chunk_kernel(
    scores,
    targets,
    carried,
    n_tokens,
    n_columns,
    row,
    start,
    factor,
    cap,
    CAPPED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    mine = scores + token * row
    column = tl.load(targets + token) - start
    if (column >= 0) & (column < n_columns):
        score, slope = _score(tl.load(mine + column), factor, cap, CAPPED)
        tl.store(carried + 2 * n_tokens + token, score)
        tl.store(carried + 3 * n_tokens + token, slope)
    before = tl.load(carried + token)
    greatest = before
    for first in range(0, n_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        found, _ = _score(tl.load(mine + columns, mask=columns < n_columns, other=0.0), factor, cap, CAPPED)
        greatest = tl.maximum(greatest, tl.max(tl.where(columns < n_columns, found, -float("inf")), axis=0))
    tl.debug_barrier()
    total = 0.0
    for first in range(0, n_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < n_columns
        found, slope = _score(tl.load(mine + columns, mask=inside, other=0.0), factor, cap, CAPPED)
        weight = tl.where(inside, tl.exp(found - greatest), 0.0)
        total += tl.sum(weight, axis=0)
        if WEIGHTS:
            tl.store(mine + columns, (weight * slope).to(scores.dtype.element_ty), mask=inside)
    shrinks = tl.exp(before - greatest)
    tl.store(carried + token, greatest)
    tl.store(carried + n_tokens + token, tl.load(carried + n_tokens + token) * shrinks + total)
    tl.store(carried + 4 * n_tokens + token, shrinks)


def vocabulary_chunk_(
    scores: Tensor, targets: Tensor, carried: Tensor, start: int, factor: float, cap: float, weights: bool
) -> None:
    """Take the products (N, V) of a chunk that begins at row `start` into what is `carried` (5, N).

    `cap` 0: there is none. `weights`: leave exp(l - m) times the cap's slope in the place of the products.
    """
    n_tokens, n_columns = scores.shape
    if n_tokens:
        sizes = n_tokens, n_columns, scores.stride(0), start, factor, cap
        chunk_kernel[(n_tokens,)](scores, targets, carried, *sizes, cap != 0.0, weights, BLOCK, enable_fp_fusion=True)
