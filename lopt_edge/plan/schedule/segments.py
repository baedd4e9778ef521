"""Segments: the depth cut into ranges of layers, each with one loss.

A segment is an ordered range of layers whose backward ends at its own beginning. What trains it is its `loss`:

    task          the task loss, at the end of the depth
    reconstruct   LoPT's local loss: an aux head reconstructs the segment's input from its output
    next-token    a local loss: the task loss read out at the segment's end, through the frozen norm and lm_head
    following     none of its own: the next segment's loss, whose gradient reaches it
    align         a local loss: the negative cosine to a teacher's last hidden state
    rest          nothing in this kind of step; its adapters run, and train in another kind
    none          nothing at all: it has no adapters of its own to train

Some methods change what happens to single layers: a `through` layer runs forward only and hands an incoming gradient on
unchanged (LCSB), an `absent` one is not run (SegProp), a `replaced` one has no weights of its own and reads those of the
layers beside it (RepL). MLAAN widens what a loss sees: its gradient may `reach` back over the segment before, and between
the segment's end and the head a `tail` of later layers may run, with averaged adapters, through which the gradient passes.
Such a segment's loss has a pass of its own over each micro-batch, its `window`. The rule: the segments of a step name every
layer once, in order. What a loss computes is `run/step/losses.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from lopt_edge.errors import InputError

SegmentLoss = Literal["task", "reconstruct", "next-token", "following", "align", "rest", "none"]
LOSSES: tuple[str, ...] = get_args(SegmentLoss)
FORWARD_ONLY = ("rest", "none")
READ_OUT = ("task", "next-token")  # through the norm and the lm_head
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Segment:
    """A segment: layers `first` .. `last` (both included) and the loss that trains them.

    `reach` is the layer where the loss' gradient ends (None: at `first`); `tail` are later layers before its head.
    """

    index: int
    first: int
    last: int
    loss: SegmentLoss
    through: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    replaced: tuple[int, ...] = ()
    reach: int | None = None
    tail: tuple[int, ...] = ()

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers of the segment that run forward."""
        absent = frozenset(self.absent)
        return tuple(layer for layer in range(self.first, self.last + 1) if layer not in absent)

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """The layers that have a backward in this kind of step."""
        return () if self.loss in FORWARD_ONLY else tuple(layer for layer in self.layers if layer not in self.through)

    @property
    def trains(self) -> bool:
        return self.loss not in FORWARD_ONLY

    @property
    def has_loss(self) -> bool:
        """Whether a loss is taken at its end."""
        return self.trains and self.loss != "following"

    @property
    def is_local(self) -> bool:
        return self.has_loss and self.loss != "task"

    @property
    def overlaps(self) -> bool:
        """Whether its loss sees more than itself, so that it needs a pass of its own."""
        return self.reach is not None or bool(self.tail)

    @property
    def begin(self) -> int:
        """The layer where its loss' gradient ends."""
        return self.first if self.reach is None else self.reach

    @cached_property
    def reached(self) -> tuple[int, ...]:
        """The layers whose adapters get gradients of its loss."""
        return (*range(self.begin, self.first), *self.trained) if self.has_loss else ()

    @cached_property
    def turned(self) -> tuple[int, ...]:
        """The layers that its gradient passes, the tail's too: each keeps something from its forward for its backward."""
        return (*self.reached, *self.tail)

    @cached_property
    def window(self) -> tuple[int, ...]:
        """The layers that run forward for its sake. There are none where its loss is the next segment's, whose window holds
        them."""
        return () if self.loss == "following" else (*range(self.begin, self.first), *self.layers, *self.tail)

    @property
    def reads_out(self) -> bool:
        """Whether its loss goes through the norm and the lm_head."""
        return self.loss in READ_OUT

    @property
    def has_head(self) -> bool:
        """Whether its loss has parameters of its own."""
        return self.loss == "reconstruct"

    def reads(self, layer: int) -> tuple[int, ...]:
        """The layers whose weights a layer computes with."""
        return (layer - 1, layer + 1) if layer in self.replaced else (layer,)

    def text(self) -> str:
        """The segment as a plan writes it (ops.py parses it)."""
        words = [f"segment {self.index} layers={self.first}-{self.last} loss={self.loss}"]
        exceptions = (("through", self.through), ("absent", self.absent), ("replaced", self.replaced))
        words += [f"{name}={runs_text(layers)}" for name, layers in exceptions if layers]
        words += [] if self.reach is None else [f"reach={self.reach}"]
        words += [f"tail={runs_text(self.tail)}"] if self.tail else []
        return " ".join(words)


def runs_text(layers: tuple[int, ...]) -> str:
    """The layers in runs: `0-3,7`."""
    starts = [i for i in range(len(layers)) if not i or layers[i] != layers[i - 1] + 1]
    ends = [*(start - 1 for start in starts[1:]), len(layers) - 1]
    return ",".join(f"{layers[a]}-{layers[b]}" if b > a else f"{layers[a]}" for a, b in zip(starts, ends, strict=True))


def parse_runs(text: str) -> tuple[int, ...]:
    """The layers of `0-3,7`. Raises ValueError for more than any model has."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        run = range(int(first), int(last or first) + 1)
        if len(found) + len(run) > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS:,} layers")
        found += run
    return tuple(found)


def cut_depth(
    early: SegmentLoss, *, n_layers: int, num_segments: int, boundary_layers: Sequence[int] | None = None
) -> tuple[Segment, ...]:
    """The segments of LoPT's cut: the last one learns the task, every earlier one has the loss `early`.

    There are k contiguous blocks of num_layers // k layers, the remainder to the first ones. `boundary_layers`: each begins
    the next segment; they replace `num_segments`. Raises InputError.
    """
    starts = (
        [0, *_checked_boundaries(boundary_layers, n_layers)] if boundary_layers else _even_starts(n_layers, num_segments)
    )
    ends = [*starts[1:], n_layers]
    return tuple(
        Segment(i, first, end - 1, "task" if end == n_layers else early)
        for i, (first, end) in enumerate(zip(starts, ends, strict=True))
    )


def _even_starts(n_layers: int, num_segments: int) -> list[int]:
    if not 1 <= num_segments <= n_layers:
        raise InputError(
            f"{num_segments} is impossible: the model has {n_layers} layers",
            where="num_segments",
            fix=f"choose 1 to {n_layers}",
        )
    size, rest = divmod(n_layers, num_segments)
    return [i * size + min(i, rest) for i in range(num_segments)]


def _checked_boundaries(boundaries: Sequence[int], n_layers: int) -> list[int]:
    inside = all(0 < layer < n_layers for layer in boundaries)
    if not inside or sorted(set(boundaries)) != list(boundaries):
        raise InputError(
            f"{list(boundaries)} must rise and lie between 1 and {n_layers - 1}",
            where="boundary_layers",
            fix="layer numbers count from 0; each named layer begins the next segment",
        )
    return list(boundaries)
