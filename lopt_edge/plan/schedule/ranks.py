"""Data parallel over processes ("ranks"), as a pass over the op list: each rank has the whole model and a share of a step.

A step's micro-batches are dealt to the ranks in order, without overlap, so the window is the same whatever their number.
Each loss is divided by the totals of the whole window; so the sum of the ranks' gradients is the step's gradient (design
law 5), and as every rank sums it in the same order, all hold the same adapters to the last bit. Only adapters and aux heads
are exchanged, one parameter group at a time: a group is one flat tensor, which is the bucket.

`for_ranks` takes the plan of a rank's share and adds what the others are needed for:

    BACKWARD 7 mb=1
    REDUCE layer 7              the sum over all ranks begins
    BACKWARD 6 mb=1             and runs beside this
    WAIT reduced layer 7        here it has come, and the group's norm is taken
    REDUCE layer 6
    ...
    AGREE                       whether all numbers of all ranks are finite
    STEP layer 7

One sum is under way at a time, so its buffer is a group's. A rank without a micro-batch (a window may have fewer than there
are ranks) gives zeros. The order of groups is the same in every rank, however many micro-batches each has. Applied before
the memory passes. Steps with early updates are refused (config/rules.py): nothing could undo one that another rank has
found bad. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lopt_edge.plan.schedule.effects import COMPUTE, REDUCED, Kind
from lopt_edge.plan.schedule.ops import GroupName, Op, Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """One of the processes that share a step's micro-batches."""

    rank: int

    def text(self) -> str:
        """The rank in words, for people."""
        return f"rank {self.rank}"


def shares(items: Sequence[T], ranks: int) -> list[Sequence[T]]:
    """What each rank gets of these: neighbours, as evenly as can be, the remainder to the first ranks."""
    size, rest = divmod(len(items), ranks)
    starts = [rank * size + min(rank, rest) for rank in range(ranks + 1)]
    return [items[starts[rank] : starts[rank + 1]] for rank in range(ranks)]


def largest_share(items: Sequence[T], ranks: int) -> Sequence[T]:
    """The first of these, as many as the rank with the most gets: of micro-batches sorted by size, no share takes more."""
    return items[: -(-len(items) // ranks)]


def chunk_elements(n_elements: int, ranks: int) -> int:
    """The elements that each rank sums of a group; the last ranks may have fewer."""
    return -(-n_elements // ranks)


def exchange_elements(n_elements: int, ranks: int) -> int:
    """The elements of the buffer in which a rank receives all ranks' parts of its chunk."""
    return ranks * chunk_elements(n_elements, ranks)


def for_ranks(plan: Plan, usual: Plan, *, ranks: int) -> Plan:
    """The plan of one rank's share of a step. `usual` is the plan of the same kind over one micro-batch, which gives the
    order of groups to a rank that has none."""
    if plan.has_early_steps:
        raise ValueError("early steps cannot be shared among ranks")
    done = completions(plan) if plan.n_micro_batches else {-1 - i: g for i, g in enumerate(completions(usual).values())}
    ops: list[Op] = [op for position, group in done.items() if position < 0 for op in _begin_and_end(group)]
    under_way: GroupName | None = None
    agreed = False
    for position, op in enumerate(plan.ops):
        if op.kind is Kind.STEP and not agreed:
            ops += _end(under_way)
            ops.append(Op(Kind.AGREE))
            under_way, agreed = None, True
        ops.append(op)
        if op.kind in COMPUTE:
            ops += _end(under_way)
            under_way = None
        if position in done:
            under_way = done[position]
            ops.append(_begin_and_end(under_way)[0])
    return replace(plan, ops=tuple(ops), ranks=ranks)


def completions(plan: Plan) -> dict[int, GroupName]:
    """The groups whose gradients are complete in this process, by the position of the op after which they are, in order."""
    last = {plan.group_of(op): position for position, op in enumerate(plan.ops) if op.effect.trains and plan.trains(op)}
    return {position: group for group, position in sorted(last.items(), key=lambda pair: pair[1])}


def _begin_and_end(group: GroupName) -> tuple[Op, Op]:
    unit, target = group
    return Op(Kind.REDUCE, target, unit=unit), Op(Kind.WAIT, target, item=REDUCED, unit=unit)


def _end(group: GroupName | None) -> list[Op]:
    return [] if group is None else [_begin_and_end(group)[1]]
