"""Causal attention on a GPU by torch's fused kernels, called by name, whose backward takes a few heads at a time.

torch's `scaled_dot_product_attention` chooses a kernel by itself, and in two cases badly. Where heads share keys
(`enable_gqa`) and flash attention cannot run (cards before Ampere, float32), it takes the one that makes scores of all
heads x tokens x tokens. And flash's backward takes the gradient of all queries in fp32, and of keys and values once for
every head, beside its results: 32 KiB a token on an 8B, 2.3 GiB at 74,000 tokens, the most of a step. Here
- which kernel runs says the device (run/device.py); the planner knows the same rule (plan/costs/shape.py)
- the backward runs over as many heads of keys as the device's `attention_bytes` allow (plan/costs/tiles.py, which both the
  planner and this file ask), one at least. Heads do not know each other, so this changes no sum
- the memory-efficient kernel, which wants a key for every head, gets the keys of those heads alone repeated, forward too

The graph keeps query, key and value, the output, and the logarithm of each query's sum. A mask, a cache, or a form of heads
that no fused kernel takes goes to transformers' own function. On a GPU flash's backward adds up by atomic operations, so
that two runs of it may differ in the last bit; nothing here changes that.

Shapes: B sequences, H heads, G heads that share keys, T tokens, E features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.plan.costs.tiles import EFFICIENT, FLASH, heads_at_once
from lopt_edge.run.device import device_of


@dataclass(frozen=True)
class Kernel:
    """A fused kernel: `forward` (query, key, value, scale) gives the output and the logarithms of sums, `backward` (the
    output's gradient, query, key, value, output, logarithms, scale) the three gradients. `repeats`: it wants a key for
    every head.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    repeats: bool


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    return found[0], found[1]


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, unused = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))  # no dropout
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, logs, None, None, query.shape[2], key.shape[2], 0.0, True, seed, unused, scale=scale
    )
    return found


def _efficient(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_efficient_attention
    found = operation(query, key, value, None, True, 0.0, True, scale=scale)
    return found[0], found[1]


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))  # no dropout
    wanted = [True, True, True, False]
    found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, out, logs, seed, offset, 0.0, wanted, True, scale=scale
    )
    return found[0], found[1], found[2]


KERNELS = {
    FLASH: Kernel(FLASH, _flash, _flash_backward, repeats=False),
    EFFICIENT: Kernel(EFFICIENT, _efficient, _efficient_backward, repeats=True),
}


def attend(
    module: nn.Module,
    query_BHTE: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention with transformers' signature; the result is (B, T, H, E), and no weights."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    whole = attention_mask is None and query_BHTE.shape[2] == key.shape[2] > 1 and not dropout
    name = device_of(query_BHTE.device).attention_kernel(query_BHTE.dtype, query_BHTE.shape[-1]) if whole else None
    if name is None or value.shape[-1] != query_BHTE.shape[-1]:
        found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query_BHTE, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return found
    return fused(query_BHTE, key, value, KERNELS[name], scale=scaling), None


def fused(
    query_BHTE: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    *,
    scale: float | None = None,
    at_once: int | None = None,
) -> Tensor:
    """The output (B, T, H, E) of a kernel; key and value are (B, H / G, T, E).

    `at_once`: heads of keys at a time (default: as many as the device's workspace allows).
    """
    scale = query_BHTE.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Fused.apply(query_BHTE, key, value, kernel, scale, at_once)  # type: ignore[no-untyped-call]  # torch's apply has no types
    return out.transpose(1, 2)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float, at_once: int | None
    ) -> Tensor:
        ctx.kernel, ctx.scale, parts = kernel, scale, list(_parts(kernel, query, key, at_once))
        ctx.parts = parts
        if not kernel.repeats or query.shape[1] == key.shape[1]:
            out, logs = kernel.forward(query, key, value, scale)
        else:
            out, logs = _forward_in_parts(kernel, parts, query, key, value, scale)
        ctx.save_for_backward(query, key, value, out, logs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logs = ctx.saved_tensors
        kernel, parts = ctx.kernel, ctx.parts
        if len(parts) == 1 and not (kernel.repeats and query.shape[1] != key.shape[1]):
            return *kernel.backward(grads[0], query, key, value, out, logs, ctx.scale), None, None, None
        dq, dk, dv = (_by_token(tensor) for tensor in (query, key, value))
        for heads, shared in parts:
            mine = (grads[0][:, heads], query[:, heads], *_keys(kernel, heads, key[:, shared], value[:, shared]))
            found = kernel.backward(*mine, out[:, heads], logs[:, heads].contiguous(), ctx.scale)
            dq[:, heads] = found[0]
            for target, source in ((dk, found[1]), (dv, found[2])):
                target[:, shared] = _sum_of_shared(source, shared) if kernel.repeats else source
            del mine, found  # else they would live until the next part's are there
        return dq, dk, dv, None, None, None


def _parts(kernel: Kernel, query: Tensor, key: Tensor, at_once: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield (heads, heads of keys) of each part."""
    n_sequences, n_heads, n_tokens, width = query.shape
    group = n_heads // key.shape[1]
    at_once = at_once or heads_at_once(
        kernel.name,
        n_sequences * n_tokens,
        group=group,
        n_kv_heads=key.shape[1],
        head_dim=width,
        itemsize=query.element_size(),
        device_type=query.device.type,
    )
    for start in range(0, key.shape[1], at_once):
        stop = min(start + at_once, key.shape[1])
        yield slice(start * group, stop * group), slice(start, stop)


def _forward_in_parts(
    kernel: Kernel, parts: list[tuple[slice, slice]], query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, logs = _by_token(query), []
    for heads, shared in parts:
        out[:, heads], found = kernel.forward(
            query[:, heads], *_keys(kernel, heads, key[:, shared], value[:, shared]), scale
        )
        logs.append(found)
    return out, logs[0] if len(logs) == 1 else torch.cat(logs, dim=1)


def _keys(kernel: Kernel, heads: slice, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as the kernel wants them."""
    times = (heads.stop - heads.start) // key.shape[1] if kernel.repeats else 1
    if times == 1:
        return key, value
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _sum_of_shared(grad: Tensor, shared: slice) -> Tensor:
    """The sum of the gradients of a repeated key's copies, in fp32 on the way."""
    n_sequences, n_heads, n_tokens, width = grad.shape
    n_shared = shared.stop - shared.start
    return grad.reshape(n_sequences, n_shared, n_heads // n_shared, n_tokens, width).sum(dim=2)


def _by_token(like: Tensor) -> Tensor:
    """An empty tensor (B, H, T, E) in whose memory a token's heads lie together, as the kernels lay out theirs."""
    n_sequences, n_heads, n_tokens, width = like.shape
    return like.new_empty(n_sequences, n_tokens, n_heads, width).transpose(1, 2)
