"""Attention whose rotary positions are turned by our kernel (run/kernels/rotary.py), not by transformers' five calls.

transformers' attention turns its queries and keys by a function that its file calls by name. The attention of a layer gets
a class of its own here, derived from the family's, whose `forward` is the family's code with our function under that name.
The family's class and file stay as they are, for whoever else uses them.

The rule: ours stands in for a family's function only where that computes the same. Whether it does is tried once, on a few
numbers, by calling it: families that pair neighbouring features, or turn a part of them, keep their own, and so does
attention whose forward is wrapped or calls no such function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.run.kernels.operators import operators

NAME = "apply_rotary_pos_emb"
Turn = Callable[..., tuple[Tensor, Tensor]]


def rotate_by_kernel(layer: nn.Module) -> bool:
    """Let the attention of a layer turn positions by our kernel; returns whether it does."""
    found = [module for module in layer.modules() if _turns(type(module)) is not None]
    for module in found:
        cls: Any = type(module)  # a module's class is no Hashable to mypy
        module.__class__ = _derived(cls)
    return bool(found)


def _turns(cls: type[nn.Module]) -> Turn | None:
    """The function by which a class' forward turns queries and keys, where ours computes the same."""
    forward = cls.forward
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    turn = forward.__globals__.get(NAME)
    return turn if turn is not None and turns_halves(turn) else None


@lru_cache(maxsize=64)
def turns_halves(turn: Turn) -> bool:
    """Whether a function turns the first half of all features against the second, told by trying it."""
    drawn = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, generator=drawn) for heads in (2, 1))
    cosines, sines = (torch.randn(1, 3, 8, generator=drawn) for _ in range(2))  # both halves differ
    try:
        found = turn(query, key, cosines, sines)
        expected = [_by_torch(tensor, cosines[:, None], sines[:, None]) for tensor in (query, key)]
        return all(torch.allclose(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes other arguments
        return False


def _by_torch(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


@lru_cache(maxsize=64)
def _derived(cls: Any) -> Any:  # a class of modules and one derived from it
    forward = cls.forward
    own = FunctionType(
        forward.__code__,
        {**forward.__globals__, NAME: _turned_by(forward.__globals__[NAME])},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return type(f"Rotated{cls.__name__}", (cls,), {"forward": own})


def _turned_by(turn: Turn) -> Turn:
    def turned(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or cosines.shape[-1] != query.shape[-1] or cosines.dtype != query.dtype:
            return turn(query, key, cosines, sines, *rest, **named)
        return tuple(_Turned.apply(x, cosines, sines) for x in (query, key))  # type: ignore[no-untyped-call]

    return turned


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turn(x, cosines, sines, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grads[0], *ctx.saved_tensors, back=True), None, None


def _turn(x: Tensor, cosines: Tensor, sines: Tensor, *, back: bool) -> Tensor:
    together = x if x.stride(-1) == 1 else x.contiguous()
    found: Tensor = operators().rotate(together, cosines.contiguous(), sines.contiguous(), back)
    return found
