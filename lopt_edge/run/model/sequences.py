"""Attention of several sequences that lie in one row, one after the other (packing), without attention across them.

Positions restart at each sequence, and each is attended to by itself, so a row of sequences costs what they cost alone: the
scores of a sequence, not of the row. On the CPU torch's own kernel runs for one sequence at a time, on slices of what the
projections gave, and the graph keeps what that kernel's own would keep. On CUDA torch's attention over sequences of
different lengths takes all at once where the card and the dtype allow it (torch.nn.attention.varlen: 16 bits, sm80); else
each sequence goes through scaled_dot_product_attention, whose own graph is kept. Neither of these two was tested on a GPU;
the second is tested on the CPU.

The rule: on the CPU values and gradients are bitwise those of each sequence alone in a batch of one, whatever lies beside
it (tests/run/model/test_sequences.py). Except where a sequence is longer than a layer's window and heads share keys: there
transformers repeats the keys, and sums their gradients in another order.

No dropout, no cache, one row: packed micro-batches have no other. Without sequences fused_attention.py decides what runs.

Shapes: 1 row, H heads, T tokens of the row, E features of a head; n tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from lopt_edge.run.device import device_of
from lopt_edge.run.model import fused_attention

NAME = "lopt_edge_sequences"
LEAST_CAPABILITY = 8.0  # of a card that has flash attention, which varlen_attn is made of
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Sequences:
    """The lengths of the sequences in a row. `window`: how many tokens a token sees, itself included (None: all before)."""

    lengths: tuple[int, ...]
    window: int | None = None

    def __iter__(self) -> Iterator[slice]:
        """Yield where each sequence lies in the row."""
        return (slice(start, end) for start, end in pairwise((0, *accumulate(self.lengths))))

    def positions(self, device: torch.device) -> Tensor:
        """The positions (T,) of all tokens, each in its sequence."""
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])

    def mask(self, n_tokens: int, like: Tensor) -> Tensor | None:
        """What is added to the scores (n, n) of a sequence; None where the kernel's causal mask is right."""
        if self.window is None or n_tokens <= self.window:
            return None
        seen = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=like.device).tril_().triu_(1 - self.window)
        return like.new_full((n_tokens, n_tokens), float("-inf")).masked_fill_(seen, 0.0)


def register() -> None:
    """Make NAME an attention implementation that a transformers config may ask for, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequences: Sequences | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention, with transformers' signature; the result is (B, T, H, E) and no weights.

    `sequences` says what lies in the row: query (1, H, T, E), key and value (1, H / G, T, E). None: no packing.
    """
    if sequences is None:
        return fused_attention.attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = device_of(query.device)
    if device.kind.computes_on_cores and query.shape[-1] == value.shape[-1]:
        out: Tensor = _EachSequence.apply(query, key, value, sequences, scale)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2).contiguous(), None
    capability = device.capability()
    half = query.dtype in (torch.float16, torch.bfloat16)
    if capability is not None and float(capability) >= LEAST_CAPABILITY and half and query.shape[-1] <= 256:
        return at_once(query, key, value, sequences, scale), None
    return one_by_one(query, key, value, sequences, scale), None


def at_once(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """All sequences in one call of torch's attention over sequences of different lengths. For CUDA; untested."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor((0, *accumulate(sequences.lengths)), dtype=torch.int32, device=query.device)
    longest, window = max(sequences.lengths), -1 if sequences.window is None else sequences.window - 1
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    how: dict[str, Any] = {"scale": scale, "window_size": (window, 0), "enable_gqa": grouped}
    out_THE = cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest, **how))
    return out_THE.unsqueeze(0)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """Each sequence through scaled_dot_product_attention, on any device, with autograd's own graph."""
    lengths, found = list(sequences.lengths), []
    for q, k, v in zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True):
        mask = sequences.mask(q.shape[2], q)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        found.append(out.transpose(1, 2))
    return torch.cat(found, dim=1)


class _EachSequence(torch.autograd.Function):
    """torch's kernel for the CPU, sequence by sequence; nothing of one lives on into the next.

    Results lie in memory as the kernel lays them for a whole row, as query, key and value do: so what is kept and copied
    is what is without packing, and the planner has one program for both (plan/costs/programs.py).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
        _, n_heads, n_tokens, _ = query.shape
        out = torch.empty_like(query)
        sums_BTH = None  # logarithms of the softmax's sums
        if any(ctx.needs_input_grad):
            sums_BTH = query.new_empty(1, n_tokens, n_heads, dtype=torch.float32)
        for rows in sequences:
            parts = query[:, :, rows], key[:, :, rows], value[:, :, rows]
            _forward(parts, sequences, scale, out[:, :, rows], None if sums_BTH is None else sums_BTH[:, rows])
        ctx.sequences, ctx.scale = sequences, scale
        ctx.save_for_backward(query, key, value, out, sums_BTH)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums_BTH = ctx.saved_tensors
        found = [torch.empty_like(part) for part in (query, key, value)]
        for rows in ctx.sequences:
            made = grads[0][:, :, rows], out[:, :, rows], sums_BTH[:, rows].transpose(1, 2)
            parts = query[:, :, rows], key[:, :, rows], value[:, :, rows]
            _backward(made, parts, ctx.sequences, ctx.scale, [part[:, :, rows] for part in found])
        return (*found, None, None)


def _forward(parts: tuple[Tensor, ...], sequences: Sequences, scale: float, whole: Tensor, sums_BTH: Tensor | None) -> None:
    """Fill a sequence's part of the output, and of the sums where they are kept."""
    mask = sequences.mask(whole.shape[2], whole)
    out, sums = KERNEL(*parts, 0.0, mask is None, attn_mask=mask, scale=scale)
    whole.copy_(out)
    if sums_BTH is not None:
        sums_BTH.copy_(sums.transpose(1, 2))


def _backward(
    made: tuple[Tensor, ...], parts: tuple[Tensor, ...], sequences: Sequences, scale: float, found: list[Tensor]
) -> None:
    """Fill a sequence's part of the gradients. `made`: the output's gradient, the output and the sums."""
    g, out, sums = made
    mask = sequences.mask(g.shape[2], g)
    own = KERNEL_BACKWARD(g, *parts, out, sums, 0.0, mask is None, attn_mask=mask, scale=scale)
    for whole, part in zip(found, own, strict=True):
        whole.copy_(part)
