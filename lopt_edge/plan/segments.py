"""Segments: the depth cut into contiguous ranges of layers, each with one loss.

LoPT (arXiv 2605.04913): k contiguous blocks of num_layers // k layers, the remainder to the first ones; every block but
the last learns by reconstructing its own input, the last one learns the task. `frozen` gives the early blocks no loss at
all (the honest control); `e2e` is one segment. The rule: segments cover every layer once, in order. What a segment's
loss computes is `run/losses.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lopt_edge.errors import InputError

SegmentLoss = Literal["task", "reconstruct", "none"]
Method = Literal["lopt", "e2e", "frozen"]


@dataclass(frozen=True)
class Segment:
    """Layers `first` .. `last` (both included) and the loss that trains them."""

    index: int
    first: int
    last: int
    loss: SegmentLoss

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)


def make_segments(
    method: Method, *, n_layers: int, num_segments: int, boundary_layers: Sequence[int] | None = None
) -> tuple[Segment, ...]:
    """The segments of a run. `boundary_layers`: each begins the next segment; they replace `num_segments`."""
    if method == "e2e":
        starts = [0]
    elif boundary_layers:
        starts = [0, *_checked_boundaries(boundary_layers, n_layers)]
    else:
        starts = _even_starts(n_layers, num_segments)
    early: SegmentLoss = "reconstruct" if method == "lopt" else "none"
    ends = [*starts[1:], n_layers]
    return tuple(
        Segment(i, first, end - 1, "task" if end == n_layers else early)
        for i, (first, end) in enumerate(zip(starts, ends, strict=True))
    )


def _even_starts(n_layers: int, num_segments: int) -> list[int]:
    if not 1 <= num_segments <= n_layers:
        raise InputError(
            f"num_segments {num_segments} is impossible: the model has {n_layers} layers",
            where="num_segments",
            fix=f"choose 1 to {n_layers}",
        )
    size, rest = divmod(n_layers, num_segments)
    return [i * size + min(i, rest) for i in range(num_segments)]


def _checked_boundaries(boundaries: Sequence[int], n_layers: int) -> list[int]:
    inside = all(0 < layer < n_layers for layer in boundaries)
    if not inside or sorted(set(boundaries)) != list(boundaries):
        raise InputError(
            f"boundary layers {list(boundaries)} must rise and lie between 1 and {n_layers - 1}",
            where="boundary_layers",
            fix="layer numbers count from 0; each named layer begins the next segment",
        )
    return list(boundaries)
