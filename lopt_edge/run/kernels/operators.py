"""Our kernels as operators of torch, so that it can tell what they read and write, and what shape comes back.

The rule: nothing else calls a kernel. A call goes through torch's dispatcher, where what watches a run (tensors counted, a
card in name) sees it as it sees torch's own. The operators have no gradient: they are called inside functions that
have one. Names that end in `_` write to what they are given.

Triton is imported when the first kernel is launched, and not where shapes are all that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

SPACE = "lopt_edge"
WRITES_INPUT = {  # operator: (file, what it takes)
    "gate_": ("gated", "(Tensor(a!) gate, Tensor up) -> ()"),
    "gate_backward_": ("gated", "(Tensor(a!) gate, Tensor(b!) up, Tensor(c!) d) -> ()"),
    "vocabulary_chunk_": (
        "cross_entropy",
        "(Tensor(a!) scores, Tensor targets, Tensor(b!) carried, int start, float factor, float cap, bool weights) -> ()",
    ),
}
LIKE = {  # operator: (file, what it takes, which argument the result is like)
    "rms_norm": ("norm", "(Tensor x, Tensor weight, float epsilon) -> Tensor", 0),
    "rms_norm_backward": ("norm", "(Tensor g, Tensor x, Tensor weight, float epsilon) -> Tensor", 1),
    "rotate": ("rotary", "(Tensor x, Tensor cosines, Tensor sines, bool back) -> Tensor", 0),
}


@lru_cache(maxsize=1)
def _defined() -> Any:
    library: Any = torch.library.Library(SPACE, "DEF")  # type: ignore[no-untyped-call]  # torch's own has no types
    for name, (file, takes) in WRITES_INPUT.items():
        _define(library, name, file, takes, shape=lambda *_: None)
    for name, (file, takes, like) in LIKE.items():
        _define(library, name, file, takes, shape=_shape_like(like))
    return library


def _define(library: Any, name: str, file: str, takes: str, *, shape: Callable[..., Any]) -> None:
    library.define(name + takes)
    for key in ("CPU", "CUDA"):  # on a CPU Triton only interprets (TRITON_INTERPRET=1): choice.py refuses it otherwise
        library.impl(name, _launcher(name, file), key)
    torch.library.register_fake(f"{SPACE}::{name}", shape, lib=library)


def _launcher(name: str, file: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"lopt_edge.run.kernels.{file}"), name)(*arguments)

    return launch


def _shape_like(argument: int) -> Callable[..., Tensor]:
    def shape(*arguments: Any) -> Tensor:
        return torch.empty_like(arguments[argument])

    return shape


def operators() -> Any:
    """The operators, by name."""
    _defined()
    return getattr(torch.ops, SPACE)
