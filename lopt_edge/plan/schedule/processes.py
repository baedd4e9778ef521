"""PPLL (arXiv 2411.12780): the segments of a local-loss method on several processes, as a pass over the op list.

No gradient crosses a gradient boundary, so segment s + 1 needs nothing of segment s but its output. A process runs a few
neighbouring segments: it receives their input, sends their output on BEFORE its own backward, and so works on micro-batch
m while the process after it works on micro-batch m - 1 and the one before it on m + 1. Nothing ever comes back but one
agreement a step: whether all numbers were finite. All updates come after that, as in one process ("stale" boundary), so
losses, gradients and adapters are the same to the last bit.

`cut_for_process` takes the plan of a whole step and leaves what one process runs: RECV in the place of EMBED (but in the
first process), SEND after its last FORWARD (but in the last one), AGREE before the first STEP. It is applied before the
memory passes, which then move that process' tensors only. Where a gradient crosses (e2e, lcsb, open steps) or a later
segment waits for an update (fresh), there is nothing to cut; config/rules.py refuses those. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lopt_edge.errors import InputError
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import ELSEWHERE, Knobs
from lopt_edge.plan.schedule.ops import Op, Plan
from lopt_edge.plan.schedule.segments import Segment


@dataclass(frozen=True)
class Part:
    """The part of process `rank` of `n`: these segments, layers `first` .. `last`."""

    rank: int
    n: int
    segments: tuple[int, ...]
    first: int
    last: int

    @property
    def is_last(self) -> bool:
        """Whether this is the last process, which has the lm_head."""
        return self.rank == self.n - 1

    def owns(self, group: tuple[str, int]) -> bool:
        """Whether a parameter group is this process': a layer's adapters, a segment's aux head."""
        unit, target = group
        return self.first <= target <= self.last if unit == "layer" else target in self.segments

    def text(self) -> str:
        """The part in words, for people."""
        return f"process {self.rank} (layers {self.first}-{self.last})"


def parts_of(segments: Sequence[Segment], n: int) -> tuple[Part, ...]:
    """The parts of `n` processes: neighbouring segments for each, as evenly as can be; the remainder to the first ones,
    since the last one has the lm_head as well. Raises InputError for more processes than segments."""
    if not 1 <= n <= len(segments):
        raise InputError(
            f"{n} processes for {len(segments)} segments: each needs one of its own",
            where="pipeline",
            fix=f"choose at most {len(segments)}, or more segments (--num-segments)",
        )
    size, rest = divmod(len(segments), n)
    starts = [rank * size + min(rank, rest) for rank in range(n + 1)]
    return tuple(
        Part(rank, n, tuple(range(start, end)), segments[start].first, segments[end - 1].last)
        for rank, (start, end) in enumerate(pairwise(starts))
    )


def own_knobs(knobs: Knobs, part: Part) -> Knobs:
    """The settings as one process has them: the other processes' layers (and the lm_head, but for the last one) are
    elsewhere."""
    weights = tuple(place if part.first <= i <= part.last else ELSEWHERE for i, place in enumerate(knobs.weights))
    return replace(knobs, weights=weights, head=knobs.head if part.is_last else ELSEWHERE)


def cut_for_process(plan: Plan, part: Part) -> Plan:
    """The plan of what this process runs of a whole step. The plan has no movements yet."""
    if plan.has_early_steps or any(op.kind in (Kind.READ, Kind.WRITE) for op in plan.ops):
        raise ValueError("early steps and a boundary cache cannot be cut into processes")
    ops: list[Op] = []
    agreed = False
    for op in plan.ops:
        if op.kind is Kind.STEP and not agreed:
            ops.append(Op(Kind.AGREE))
            agreed = True
        ops += _here(op, part)
    return replace(plan, ops=tuple(ops), own=part.segments)


def _here(op: Op, part: Part) -> tuple[Op, ...]:
    """The ops that an op of the whole step becomes in this process."""
    if op.kind is Kind.EMBED:
        return (op,) if part.rank == 0 else (Op(Kind.RECV, part.first, op.micro_batch),)
    if op.kind is Kind.LOSS:
        return (op,) if op.target in part.segments else ()
    if not part.owns((op.unit or "layer", op.target)):
        return ()
    if op.kind is Kind.FORWARD and op.target == part.last and not part.is_last:
        return op, Op(Kind.SEND, part.last + 1, op.micro_batch)
    return (op,)
