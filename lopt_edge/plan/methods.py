"""Methods: each writes the op list of one optimizer step. `lopt`, `e2e` and `frozen` differ only in their segments.

LoPT in its sequential form (arXiv 2605.04913; the released loop runs a joint backward, which saves no memory): each
segment runs forward, takes its loss and runs backward before the next segment starts, so that one segment's saved inputs
are gone before the next one's exist. All STEPs come last, after every micro-batch, so the boundary is that of before
the update ("stale") and the gradients are exactly those of the joint loss.

The last layer of a segment keeps its graph: its backward comes right after its forward, so recomputing it would be work
for nothing. A segment without loss keeps nothing. Where tensors lie is not decided here (passes.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from lopt_edge.plan.ops import Keep, Kind, Op, Plan
from lopt_edge.plan.segments import Segment


def step_plan(
    method: str,
    segments: tuple[Segment, ...],
    *,
    n_micro_batches: int,
    placement: tuple[tuple[str, str], ...] = (),
) -> Plan:
    """The plan of one optimizer step over `n_micro_batches` micro-batches, all on the device."""
    ops: list[Op] = []
    for micro_batch in range(n_micro_batches):
        ops.append(Op(Kind.EMBED, micro_batch=micro_batch))
        for segment in segments:
            ops += _segment_ops(segment, micro_batch)
    for segment in segments:
        ops += [Op(Kind.STEP, target, unit=unit) for unit, target in groups_of(segment)]
    return Plan(method, segments[-1].last + 1, n_micro_batches, segments, placement, tuple(ops))


def groups_of(segment: Segment) -> list[tuple[str, int]]:
    """The parameter groups of a segment: one a layer, and the aux head of a local loss."""
    if segment.loss == "none":
        return []
    return [("layer", layer) for layer in segment.layers] + ([("aux", segment.index)] * (segment.loss == "reconstruct"))


def _segment_ops(segment: Segment, micro_batch: int) -> Iterator[Op]:
    trains = segment.loss != "none"
    for layer in segment.layers:
        keep = Keep.NONE if not trains else Keep.GRAPH if layer == segment.last else Keep.INPUT
        yield Op(Kind.FORWARD, layer, micro_batch, keep)
    if trains:
        yield Op(Kind.LOSS, segment.index, micro_batch)
        for layer in reversed(segment.layers):
            yield Op(Kind.BACKWARD, layer, micro_batch)
