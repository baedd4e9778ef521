"""Where a step may be left and taken up again: between two micro-batches.

Before a micro-batch's EMBED (or its READ of a boundary) nothing of an earlier one is alive but its part of the gradients
and losses (the caller makes sure). What ops before the cut began and ops after it count on are movements: streamed weights
on their way or in their buffer, and gradients on another tier. `movements_before` gives the ops which bring a fresh
executor there. The plan that goes on may be another one than that which was left (another budget), as long as its
micro-batches are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopt_edge.plan.schedule.ops import Op, Plan


@dataclass(frozen=True)
class Movements:
    """The movement ops to run, in order; those of gradients by group, so that a group can be put in its place before the
    next comes."""

    of_weights: tuple[Op, ...]
    of_gradients: dict[tuple[str, int], tuple[Op, ...]]


def cut_before(plan: Plan, micro_batch: int) -> int:
    """The position where that micro-batch begins. Raises ValueError if the plan has none."""
    for position, op in enumerate(plan.ops):
        if op.effect.enters and op.micro_batch == micro_batch:
            return position
    raise ValueError(f"the plan has no micro-batch {micro_batch}")


def movements_before(plan: Plan, position: int) -> Movements:
    """The movements, of the ops before `position`, whose effect still holds there."""
    weights: dict[tuple[str, int], list[Op]] = {}
    gradients: dict[tuple[str, int], list[Op]] = {}
    for op in plan.ops[:position]:
        row = op.effect
        if row.role in ("up", "wait", "evict") and op.item == "" and row.moves in ("", "weights"):
            if row.role == "up":
                weights[op.group] = []
            weights[op.group].append(op)
            if row.role == "evict":
                del weights[op.group]
        elif op.item == "gradients" and row.role in ("up", "down", "wait"):
            if row.role == "down":
                gradients[op.group] = []
            gradients.setdefault(op.group, []).append(op)
    return Movements(
        tuple(op for ops in weights.values() for op in ops),
        {group: tuple(ops) for group, ops in gradients.items()},
    )
