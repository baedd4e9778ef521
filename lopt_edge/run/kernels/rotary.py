"""Rotary positions in one kernel: each half of a head's features turned against the other, forward and back.

    y1 = x1 c1 - x2 s1,  y2 = x2 c2 + x1 s2;   back: dx1 = g1 c1 + g2 s2,  dx2 = g2 c2 - g1 s1
with cosines and sines as transformers hands them out, a full width each (the halves need not be equal). Computed in fp32
and rounded once, where torch's five calls round three times. Only this form of pairs, feature i with i + E / 2, and only
where all features turn; who pairs neighbours, or turns a part, computes by torch (run/model/rotated.py decides).

Tensors are (B, H, T, E), in memory by token or by head; the result lies as the input does. A program has one token of all
heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n_tokens"])
def rotate_kernel(
    x,
    y,
    cosines,
    sines,
    n_tokens,
    x_sequence,
    x_head,
    x_token,
    y_sequence,
    y_head,
    y_token,
    table_sequence,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BACK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    sequence, token = place // n_tokens, place % n_tokens
    heads, features = tl.arange(0, HEAD_BLOCK), tl.arange(0, HALF_BLOCK)
    in_half = features < HALF
    inside = (heads[:, None] < HEADS) & in_half[None, :]
    table = sequence * table_sequence + token * 2 * HALF + features
    c1 = tl.load(cosines + table, mask=in_half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cosines + table + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sines + table, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sines + table + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    source = x + sequence * x_sequence + token * x_token + heads[:, None] * x_head + features[None, :]
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    target = y + sequence * y_sequence + token * y_token + heads[:, None] * y_head + features[None, :]
    tl.store(target, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF, y2.to(y.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, back: bool) -> Tensor:
    """Queries or keys (B, H, T, E), features together, turned by tables (B or 1, T, E), or their gradient turned back."""
    n_sequences, n_heads, n_tokens, width = x.shape
    y = torch.empty_like(x)
    if x.numel():
        rotate_kernel[(n_sequences * n_tokens,)](
            x,
            y,
            cosines,
            sines,
            n_tokens,
            *x.stride()[:3],
            *y.stride()[:3],
            n_tokens * width if len(cosines) > 1 else 0,
            n_heads,
            width // 2,
            triton.next_power_of_2(n_heads),
            triton.next_power_of_2(width // 2),
            back,
            enable_fp_fusion=True,
        )
    return y
