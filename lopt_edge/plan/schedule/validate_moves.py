"""The part of the validator that follows movements between tiers: where each thing is after every op.

A thing is a streamed layer's weights, a saved input, a layer's pages, a group's optimizer states or gradients. It is
absent, `here` (on the device), `below` (on another tier), on its way (`up`, `down`), or `both` (a copy below is still
good). The rules are numbered in `validate.py`.
"""

from __future__ import annotations

from typing import Literal

from lopt_edge.plan.schedule.effects import _ITEMS, _NEEDS_TIER
from lopt_edge.plan.schedule.ops import Keep, Kind, Op, Plan

State = Literal["here", "below", "up", "down", "both"]
Thing = tuple[str, int, int]  # (item, micro-batch, target); for states and gradients the item names the unit too


def _trains(op: Op) -> bool:
    return op.kind is Kind.BACKWARD and op.adapters == "train"


class Moves:
    """`problem_before` judges an op by where things are; `note_compute` records what an op makes and frees."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.placement = dict(plan.placement)
        self.at: dict[Thing, State] = {}
        self.below_at_rest = {op.group for op in plan.ops if op.kind is Kind.STORE and op.item == "states"}

    def is_here(self, item: str, micro_batch: int, target: int) -> bool:
        return self.at.get((item, micro_batch, target)) in ("here", "both")

    def problem_before(self, op: Op) -> str:
        if op.kind in _NEEDS_TIER and op.tier not in ("host", "disk"):
            return f"(6): {op.text()} does not say where to"
        if (op.kind in (Kind.LOAD, Kind.STORE)) != (op.item in ("states", "gradients")) and op.kind is not Kind.WAIT:
            return f"(6): {op.text()} does not say what moves"
        if op.kind is Kind.FETCH and op.unit != "layer":
            return f"(1): {op.text()} names no layer"
        if op.kind in (Kind.EMBED, Kind.FORWARD, Kind.BACKWARD, Kind.LOSS):
            return self._unplaced(op) or self._needs(op)
        if op.kind is Kind.STEP:
            return self._step_needs(op)
        if op.kind in (Kind.READ, Kind.WRITE, Kind.ALIGN, Kind.HOLD, Kind.AVERAGE, Kind.RECV, Kind.SEND, Kind.AGREE):
            return ""
        if op.kind in (Kind.FETCH, Kind.EVICT) and not op.item:
            return self._weights(op)
        return self._move(op)

    def _unplaced(self, op: Op) -> str:
        reads_out = op.kind is Kind.LOSS and 0 <= op.target < len(self.plan.segments)
        reads_out = reads_out and self.plan.segments[op.target].reads_out
        unit = {Kind.EMBED: "embed", Kind.LOSS: "head" if reads_out else ""}.get(op.kind, f"layer {op.target}")
        if unit and unit not in self.placement:
            return f"(1): unit {unit!r} is read but has no placement"
        for layer in self.plan.reads(op.target) if unit.startswith("layer") else ():
            place = self.placement.get(f"layer {layer}")
            if place != "resident" and not self.is_here("layer", -1, layer):
                return f"(1): layer {layer} is not on the device"
        return ""

    def _needs(self, op: Op) -> str:
        group = "layer" if _trains(op) else "aux" if op.kind is Kind.LOSS else ""
        if group and self.at.get((f"gradients {group}", -1, op.target), "here") != "here":
            return f"(7): the gradients of {group} {op.target} so far are not on the device"
        if op.kind is not Kind.BACKWARD:
            return ""
        for item in ("input", "pages"):
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

    def note_compute(self, op: Op) -> str:
        thing = ("pages" if op.keep is Keep.PAGES else "input", op.micro_batch, op.target)
        if op.kind is Kind.FORWARD and op.keep in (Keep.INPUT, Keep.PAGES):
            self.at[thing] = "here"
        elif op.kind is Kind.BACKWARD:
            for item in ("input", "pages"):
                self.at.pop((item, op.micro_batch, op.target), None)
        elif op.kind is Kind.STEP:
            self.at.pop((f"gradients {op.unit}", -1, op.target), None)
        if _trains(op) or (op.kind is Kind.LOSS and self.plan.segments[op.target].has_head):
            self.at[f"gradients {'layer' if op.kind is Kind.BACKWARD else 'aux'}", -1, op.target] = "here"
        return ""

    def _weights(self, op: Op) -> str:
        thing, unit = ("layer", -1, op.target), f"layer {op.target}"
        if self.placement.get(unit, "resident") == "resident":
            return f"(1): {unit} is not streamed"
        if op.kind is Kind.EVICT:
            return "" if self.at.pop(thing, None) == "here" else f"(6): {unit} is not there to be evicted"
        if thing in self.at:
            return f"(6): {unit} is there already"
        self.at[thing] = "up"
        taken = sum(item == "layer" for item, _, _ in self.at)
        return "" if taken <= self.plan.ring else f"(1): {taken} streamed layers at once, the ring has {self.plan.ring}"

    def _move(self, op: Op) -> str:
        item = _ITEMS.get(op.kind, op.item)
        key = f"{item} {op.unit}" if item in ("states", "gradients") else item or "layer"
        thing: Thing = (key, op.micro_batch, op.target)
        default: State | None = "below" if item == "states" and op.group in self.below_at_rest else None
        state = self.at.get(thing, default)
        name = op.text()
        if op.kind is Kind.WAIT:
            arrived: dict[State | None, State] = {"up": "here" if item != "input" else "both", "down": "below"}
            if state not in arrived:
                return f"(6): {name} waits for nothing"
            self.at[thing] = arrived[state]
        elif op.kind is Kind.EVICT:
            if state != "both":
                return f"(6): {name} has no copy below"
            self.at[thing] = "below"
        elif op.kind in (Kind.RESTORE, Kind.PAGE_IN, Kind.LOAD):
            if state != "below":
                return f"(6): {name} finds nothing below"
            self.at[thing] = "up"
        else:
            if state != "here":
                return f"(6): {name} finds nothing on the device"
            self.at[thing] = "down"
        return ""

    def left(self) -> str:
        """What is still held or on its way at the end; states at rest below are as they should be."""
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
