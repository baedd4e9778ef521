"""The part of the validator that follows movements between tiers: where each thing is after every op.

A thing is a streamed layer's weights, a saved input, a layer's pages, a group's optimizer states or gradients. It is
absent, `here` (on the device), `below` (on another tier), on its way (`up`, `down`), or `both` (a copy below is still
good). The rules are numbered in `validate.py`.
"""

from __future__ import annotations

from typing import Literal

from lopt_edge.plan.schedule.effects import GROUP_ITEMS, REDUCED, Kind
from lopt_edge.plan.schedule.ops import GroupName, Op, Plan

FOLLOWED = ("input", "pages")  # what a layer leaves and movements carry, by (micro-batch, layer)
State = Literal["here", "below", "up", "down", "both"]
Thing = tuple[str, int, int]  # (item, micro-batch, target); for states and gradients the item names the unit too


class Moves:
    """The places of all things that can move. `problem_before` judges an op by where things are; `note_compute` records
    what an op makes and frees."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.placement = dict(plan.placement)
        self.at: dict[Thing, State] = {}
        self.below_at_rest = {op.group for op in plan.ops if op.kind is Kind.STORE and op.item == "states"}

    def is_here(self, item: str, micro_batch: int, target: int) -> bool:
        """Whether this thing is on the device."""
        return self.at.get((item, micro_batch, target)) in ("here", "both")

    def is_reduced(self, group: GroupName) -> bool:
        """Whether the sum of a group's gradients over the ranks has come."""
        return self.at.get((f"{REDUCED} {group[0]}", -1, group[1])) == "here"

    def problem_before(self, op: Op) -> str:
        """The rule that an op breaks where things are now, with its number; empty if it breaks none."""
        row = op.effect
        if row.role == "down" and op.tier not in ("host", "disk"):
            return f"(6): {op.text()} does not say where to"
        if (row.moves == "group") != (op.item in GROUP_ITEMS) and row.role != "wait":
            return f"(6): {op.text()} does not say what moves"
        if row.role == "up" and row.moves == "weights" and op.unit != "layer":
            return f"(1): {op.text()} names no layer"
        if row.role == "exchange":
            return self._reduce_needs(op)
        if row.role in ("compute", "beside"):
            return (
                (self._step_needs(op) if row.uses == "group" else self._unplaced(op) or self._needs(op)) if row.uses else ""
            )
        if row.moves == "weights" and not op.item:
            return self._weights(op)
        return self._move(op)

    def _unplaced(self, op: Op) -> str:
        uses, n_segments = op.effect.uses, len(self.plan.segments)
        reads_out = 0 <= op.target < n_segments and self.plan.segments[op.target].reads_out
        unit = f"layer {op.target}" if uses == "layer" else "" if uses == "head" and not reads_out else uses
        if unit and unit not in self.placement:
            return f"(1): unit {unit!r} is read but has no placement"
        for layer in self.plan.reads(op.target) if unit.startswith("layer") else ():
            place = self.placement.get(f"layer {layer}")
            if place != "resident" and not self.is_here("layer", -1, layer):
                return f"(1): layer {layer} is not on the device"
        return ""

    def _needs(self, op: Op) -> str:
        row = op.effect
        group = row.trains if row.trains == "aux" or (row.trains and self.plan.trains(op)) else ""
        if group and (f"reduced {group}", -1, op.target) in self.at:
            return f"(10): the gradients of {group} {op.target} are being summed already"
        if group and self.at.get((f"gradients {group}", -1, op.target), "here") != "here":
            return f"(7): the gradients of {group} {op.target} so far are not on the device"
        for item in (thing.name for thing in row.frees if thing.name in FOLLOWED):
            state = self.at.get((item, op.micro_batch, op.target))
            if state not in (None, "here", "both"):
                return f"(2): the saved {item} of layer {op.target} is not on the device"
        return ""

    def _step_needs(self, op: Op) -> str:
        resting = "below" if op.group in self.below_at_rest else "here"
        for item, default in (("states", resting), ("gradients", "here")):
            if self.at.get((f"{item} {op.unit}", -1, op.target), default) != "here":
                return f"(7): the {item} of {op.unit} {op.target} are not on the device"
        return ""

    def _reduce_needs(self, op: Op) -> str:
        if (f"reduced {op.unit}", -1, op.target) in self.at:
            return f"(10): the gradients of {op.unit} {op.target} are being summed already"
        if self.at.get((f"gradients {op.unit}", -1, op.target), "here") != "here":
            return f"(10): the gradients of {op.unit} {op.target} are not on the device"
        return ""

    def note_compute(self, op: Op) -> str:
        """Record what an op makes and frees, as its row says, of the things that can move."""
        row = op.effect
        for thing in row.frees:
            if thing.name in FOLLOWED:
                self.at.pop((thing.name, op.micro_batch, op.target), None)
            elif thing.per == "group":
                self.at.pop((f"{thing.name} {op.unit}", -1, op.target), None)
        for thing in row.makes:
            if thing.when and not getattr(self.plan, thing.when)(op):
                continue
            if thing.name in FOLLOWED:
                self.at[thing.name, op.micro_batch, op.target] = "here"
            elif thing.per == "group":
                unit, target = self.plan.group_of(op)
                self.at[f"{thing.name} {unit}", -1, target] = "up" if thing.name == REDUCED else "here"
        return ""

    def _weights(self, op: Op) -> str:
        thing, unit = ("layer", -1, op.target), f"layer {op.target}"
        if self.placement.get(unit, "resident") == "resident":
            return f"(1): {unit} is not streamed"
        if op.effect.role == "evict":
            return "" if self.at.pop(thing, None) == "here" else f"(6): {unit} is not there to be evicted"
        if thing in self.at:
            return f"(6): {unit} is there already"
        self.at[thing] = "up"
        taken = sum(item == "layer" for item, _, _ in self.at)
        return "" if taken <= self.plan.ring else f"(1): {taken} streamed layers at once, the ring has {self.plan.ring}"

    def _move(self, op: Op) -> str:
        row = op.effect
        item = row.moves if row.moves in FOLLOWED else op.item
        key = f"{item} {op.unit}" if item in (*GROUP_ITEMS, REDUCED) else item or "layer"
        if item == "gradients" and self.at.get((f"{REDUCED} {op.unit}", -1, op.target)) == "up":
            return f"(10): the gradients of {op.unit} {op.target} move while they are being summed"
        thing: Thing = (key, op.micro_batch, op.target)
        default: State | None = "below" if item == "states" and op.group in self.below_at_rest else None
        state = self.at.get(thing, default)
        name = op.text()
        if row.role == "wait":
            arrived: dict[State | None, State] = {"up": "here" if item != "input" else "both", "down": "below"}
            if state not in arrived:
                return f"(6): {name} waits for nothing"
            self.at[thing] = arrived[state]
        elif row.role == "evict":
            if state != "both":
                return f"(6): {name} has no copy below"
            self.at[thing] = "below"
        elif row.role == "up":
            if state != "below":
                return f"(6): {name} finds nothing below"
            self.at[thing] = "up"
        else:
            if state != "here":
                return f"(6): {name} finds nothing on the device"
            self.at[thing] = "down"
        return ""

    def left(self) -> str:
        """The things that are still there or on their way at the end, in words; states at rest below do not count."""
        for (item, _, target), state in self.at.items():
            if item == "layer":
                return f"layer {target} was fetched and not evicted"
            if state in ("up", "down"):
                return f"the movement of {item} {target} is never waited for"
            if not item.startswith("states"):
                return f"{item} {target} is never consumed"
            if state != "below" and (item.split()[1], target) in self.below_at_rest:
                return f"{item} {target} stay on the device"
        return ""
