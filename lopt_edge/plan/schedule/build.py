"""Writes the op list of one optimizer step of one kind: the same few rules for every method.

Each segment runs forward, takes its loss and runs backward before the next segment starts, so that one segment's saved
inputs are gone before the next one's exist. All STEPs come last, after every micro-batch, so a boundary is that of before
the update ("stale"). With `fresh` boundaries each training segment has a pass of its own over all micro-batches and is
updated at its end; the next pass runs the updated segment forward again.

Where segments overlap (a loss whose gradient reaches the segment before, or a tail) each loss has a pass of its own over
the micro-batch: it enters where its gradient ends, from what the pass before held there, so that no layer runs without
need. Its layers keep what they need until the tail has run, the tail's last one its graph. Averages come after all STEPs.

The last trained layer of a segment keeps its graph: its backward comes right after its forward, so recomputing it would be
work for nothing. A layer without backward keeps nothing. A step that `reads` a boundary begins with it instead of the
layers before; one that `writes` it stores it where those layers end. Where tensors lie is not decided here (passes.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import GroupName, Keep, Op, Plan
from lopt_edge.plan.schedule.segments import Segment

AVERAGED = "ema"  # the adapter set of a tail


@dataclass(frozen=True)
class StepKind:
    """The form of one optimizer step: its segments, and what is read or written beside them.

    `resting` are parameter groups that are updated without a gradient (their momentum moves them). `reads`, `writes`: the
    layer before which the cached boundary lies, None for none. `teacher`: the step reads a teacher's features; `align`: the
    layer whose output is drawn to them beside the segment's own loss. The layers before `closed` train no more in this run:
    what only an update needs of them is let go.
    """

    name: str
    segments: tuple[Segment, ...]
    resting: tuple[GroupName, ...] = ()
    fresh: bool = False
    reads: int | None = None
    writes: int | None = None
    teacher: bool = False
    align: int | None = None
    closed: int = 0


def groups_of(segment: Segment) -> list[GroupName]:
    """The parameter groups that get gradients in a segment: one a layer, and the aux head of a local loss."""
    return [("layer", layer) for layer in segment.trained] + [("aux", segment.index)] * segment.has_head


def step_plan(
    method: str,
    kind: StepKind | tuple[Segment, ...],
    *,
    n_micro_batches: int,
    placement: tuple[tuple[str, str], ...] = (),
) -> Plan:
    """The plan of one optimizer step over `n_micro_batches` micro-batches, all on the device."""
    kind = kind if isinstance(kind, StepKind) else StepKind("", kind)
    segments = kind.segments
    ops: list[Op] = []
    if overlaps := any(segment.overlaps for segment in segments):
        ops += [op for micro_batch in range(n_micro_batches) for op in _windows(segments, micro_batch)]
    for pass_index, trains in enumerate(() if overlaps else _passes(kind)):
        for micro_batch in range(n_micro_batches):
            ops += _micro_batch(kind, trains, micro_batch, pass_index)
        if kind.fresh:
            ops += [
                Op(Kind.STEP, target, unit=unit) for s in segments if s.index in trains for unit, target in groups_of(s)
            ]
    if not kind.fresh:
        ops += [Op(Kind.STEP, target, unit=unit) for segment in segments for unit, target in groups_of(segment)]
    ops += [Op(Kind.STEP, target, unit=unit) for unit, target in kind.resting]
    plan = Plan(
        method, segments[-1].last + 1, n_micro_batches, segments, placement, tuple(ops), kind=kind.name, closed=kind.closed
    )
    averages = tuple(Op(Kind.AVERAGE, layer, unit="layer") for layer in plan.averaged)
    return replace(plan, ops=(*plan.ops, *averages))


def _passes(kind: StepKind) -> list[tuple[int, ...]]:
    """The indices of the segments that train in each pass."""
    training = tuple(segment.index for segment in kind.segments if segment.trains)
    return [(index,) for index in training] if kind.fresh else [training]


def _micro_batch(kind: StepKind, trains: tuple[int, ...], micro_batch: int, pass_index: int) -> Iterator[Op]:
    if kind.reads is None:
        yield Op(Kind.EMBED, micro_batch=micro_batch, pass_index=pass_index)
    else:
        yield Op(Kind.READ, kind.reads, micro_batch, item="boundary", pass_index=pass_index)
    if kind.teacher:
        yield Op(Kind.READ, 0, micro_batch, item="teacher", pass_index=pass_index)
    for segment in kind.segments:
        if segment.first == kind.writes:
            yield Op(Kind.WRITE, segment.first, micro_batch, item="boundary", pass_index=pass_index)
        if segment.index > max(trains):
            return
        if segment.last >= (kind.reads or 0):
            yield from _segment_ops(segment, micro_batch, pass_index, trains=segment.index in trains, align=kind.align)


def _windows(segments: tuple[Segment, ...], micro_batch: int) -> Iterator[Op]:
    """The ops of the passes of one micro-batch, each keeping what the next one enters with."""
    taken = [segment for segment in segments if segment.has_loss]
    workers = dict(pairwise(segment.index for segment in taken))
    for segment in taken:
        held = segments[workers[segment.index]].begin if segment.index in workers else None
        if segment is taken[0]:
            yield Op(Kind.EMBED, micro_batch=micro_batch, pass_index=segment.index)
        else:
            yield Op(Kind.READ, segment.begin, micro_batch, item="held", pass_index=segment.index)
        yield from _window_ops(segment, micro_batch, held)


def _window_ops(segment: Segment, micro_batch: int, held: int | None) -> Iterator[Op]:
    index = segment.index
    for layer in segment.window:
        if layer == held:
            yield Op(Kind.HOLD, layer, micro_batch, pass_index=index)
        keep = Keep.GRAPH if layer == segment.turned[-1] else Keep.INPUT
        yield Op(Kind.FORWARD, layer, micro_batch, keep, index, _adapters(segment, layer))
    yield Op(Kind.LOSS, index, micro_batch, pass_index=index)
    for layer in reversed(segment.turned):
        yield Op(Kind.BACKWARD, layer, micro_batch, pass_index=index, adapters=_adapters(segment, layer))


def _adapters(segment: Segment, layer: int) -> str:
    return AVERAGED if layer in segment.tail else "train"


def _segment_ops(segment: Segment, micro_batch: int, pass_index: int, *, trains: bool, align: int | None) -> Iterator[Op]:
    trained = segment.trained if trains else ()
    for layer in segment.layers:
        keep = Keep.NONE if layer not in trained else Keep.GRAPH if layer == trained[-1] else Keep.INPUT
        yield Op(Kind.FORWARD, layer, micro_batch, keep, pass_index)
        if layer == align and layer in trained:
            yield Op(Kind.ALIGN, layer, micro_batch, pass_index=pass_index)
    if trained:
        yield Op(Kind.LOSS, segment.index, micro_batch, pass_index=pass_index)
        for layer in reversed(trained):
            yield Op(Kind.BACKWARD, layer, micro_batch, pass_index=pass_index)
