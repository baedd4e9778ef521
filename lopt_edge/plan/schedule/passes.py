"""Passes: each takes a plan and returns one that does the same work with its tensors elsewhere.

They know no method: they look for the ops that produce, use and free a thing, and put movements around them. Every
movement begins `prefetch` compute ops before its use (0: right there) and ends with a WAIT, so that the copy runs beside
another op's arithmetic; a movement down ends after the next compute op. Applied in the order of `arrange`: what is kept,
where it lies, when groups are updated, where their states and gradients lie, and which weights are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from lopt_edge.plan.schedule.build import groups_of
from lopt_edge.plan.schedule.effects import COMPUTE, RUNS_LAYER, Kind
from lopt_edge.plan.schedule.knobs import Knobs, placement_of
from lopt_edge.plan.schedule.ops import Keep, Op, Plan


def arrange(plan: Plan, knobs: Knobs) -> Plan:
    """The plan with all of `knobs` carried out."""
    plan = in_pieces(plan, knobs)
    for one_pass in (
        choose_activations,
        move_pages,
        move_saved_inputs,
        place_steps,
        move_gradients,
        move_states,
        stream_weights,
    ):
        plan = one_pass(plan, knobs)
    return plan


def in_pieces(plan: Plan, knobs: Knobs) -> Plan:
    """The plan with the tiles of its losses and the pieces of its MLPs, which no op names."""
    return replace(plan, tile=knobs.token_tile, mlp=(knobs.mlp_block, knobs.mlp_tile))


class _Insertions:
    """The ops to put before and after positions of a plan; `before` keeps the order of calls, so does `after`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.compute = [i for i, op in enumerate(plan.ops) if op.kind in COMPUTE]
        self.rank = {position: rank for rank, position in enumerate(self.compute)}
        self._before: dict[int, list[Op]] = defaultdict(list)
        self._after: dict[int, list[Op]] = defaultdict(list)

    def before(self, position: int, *ops: Op) -> None:
        self._before[position] += ops

    def after(self, position: int, *ops: Op) -> None:
        self._after[position] += ops

    def earlier(self, position: int, n_ops: int, *, not_before: int = 0) -> int:
        """The compute op `n_ops` before this one (but none before `not_before`)."""
        found = self.compute[max(0, self.rank[position] - n_ops)]
        return max(found, not_before)

    def later(self, position: int, n_ops: int) -> int:
        return self.compute[min(len(self.compute) - 1, self.rank[position] + n_ops)]

    def result(self) -> Plan:
        if not self._before and not self._after:
            return self.plan
        ops: list[Op] = []
        for position, op in enumerate(self.plan.ops):
            ops += self._before.get(position, ())
            ops.append(op)
            ops += self._after.get(position, ())
        return replace(self.plan, ops=tuple(ops))


def choose_activations(plan: Plan, knobs: Knobs) -> Plan:
    """Choose what each FORWARD keeps. A segment's last layer keeps its graph in any case: its backward follows at once."""
    kept = {"keep": Keep.GRAPH, "recompute": Keep.INPUT, "page": Keep.PAGES}

    def choose(op: Op) -> Op:
        if op.kind is not Kind.FORWARD or op.keep is Keep.NONE or op.target == plan.scope(op).turned[-1]:
            return op
        return op._replace(keep=kept[knobs.activations[op.target]])

    return replace(plan, ops=tuple(choose(op) for op in plan.ops))


def move_pages(plan: Plan, knobs: Knobs) -> Plan:
    """Insert PAGE_OUT after a movable graph was made, and PAGE_IN before its BACKWARD."""
    found = _Insertions(plan)
    for forward, backward, op in _pairs(plan, Keep.PAGES):
        wait = _of(op, Kind.WAIT, item="pages")
        _move_down(found, forward, _of(op, Kind.PAGE_OUT, tier=knobs.pages), wait, knobs)
        _move_up(found, backward, _of(op, Kind.PAGE_IN), wait, knobs, earliest=found.later(forward, 2))
    return found.result()


def move_saved_inputs(plan: Plan, knobs: Knobs) -> Plan:
    """Insert SPILL after the forward, and RESTORE before the backward; a local loss reads its target in between."""
    if knobs.saved_inputs == "device":
        return plan
    found = _Insertions(plan)
    losses = {(op.target, op.micro_batch): i for i, op in enumerate(plan.ops) if op.kind is Kind.LOSS}
    for forward, backward, op in _pairs(plan, Keep.INPUT):
        restore, wait = _of(op, Kind.RESTORE), _of(op, Kind.WAIT, item="input")
        _move_down(found, forward, _of(op, Kind.SPILL, tier=knobs.saved_inputs), wait, knobs)
        segment, earliest = plan.scope(op), found.later(forward, 2)
        if segment.loss == "reconstruct" and op.target == segment.first:
            loss = losses[segment.index, op.micro_batch]
            _move_up(found, loss, restore, wait, knobs, earliest=found.later(forward, 1 + min(1, knobs.prefetch)))
            found.after(loss, _of(op, Kind.EVICT, item="input"))
            earliest = found.later(loss, 1)
        _move_up(found, backward, restore, wait, knobs, earliest=earliest)
    return found.result()


def _pairs(plan: Plan, keep: Keep) -> Iterator[tuple[int, int, Op]]:
    """The (position of FORWARD, position of its BACKWARD, the FORWARD) for every layer that keeps this."""
    ends = {(op.target, op.micro_batch, op.pass_index): i for i, op in enumerate(plan.ops) if op.kind is Kind.BACKWARD}
    for position, op in enumerate(plan.ops):
        if op.kind is Kind.FORWARD and op.keep is keep:
            yield position, ends[op.target, op.micro_batch, op.pass_index], op


def _of(forward: Op, kind: Kind, *, item: str = "", tier: str = "") -> Op:
    """A movement of what a FORWARD kept."""
    return Op(kind, forward.target, forward.micro_batch, pass_index=forward.pass_index, item=item, tier=tier)


def _move_down(found: _Insertions, position: int, move: Op, wait: Op, knobs: Knobs) -> None:
    found.after(position, move)
    found.after(found.later(position, min(1, knobs.prefetch)), wait)


def _move_up(found: _Insertions, position: int, move: Op, wait: Op, knobs: Knobs, *, earliest: int) -> None:
    """Insert a movement up that begins `prefetch` compute ops earlier, but not before `earliest` (where the movement down
    has surely ended)."""
    found.before(found.earlier(position, knobs.prefetch, not_before=min(earliest, position)), move)
    found.before(position, wait)


def place_steps(plan: Plan, knobs: Knobs) -> Plan:
    """Put each STEP in its place. `step`: all come last. `segment`, `layer`: each comes as soon as its gradients are
    complete."""
    if knobs.apply == "step":
        return plan
    final = plan.n_micro_batches - 1
    with_gradients = {group for segment in plan.segments for group in groups_of(segment)}
    ops: list[Op] = []
    for op in plan.ops:
        if op.kind is Kind.STEP and op.group in with_gradients:
            continue
        ops.append(op)
        if op.micro_batch != final:
            continue
        if knobs.apply == "segment" and op.kind is Kind.BACKWARD:
            segment = plan.segment_of(op.target)
            if op.target == segment.trained[0]:
                ops += [Op(Kind.STEP, target, unit=unit) for unit, target in groups_of(segment)]
        elif knobs.apply == "layer" and (group := _group_of(plan, op)):
            ops.append(Op(Kind.STEP, group[1], unit=group[0]))
    return replace(plan, ops=tuple(ops))


def _group_of(plan: Plan, op: Op) -> tuple[str, int] | None:
    """The parameter group whose gradients this op makes."""
    return plan.group_of(op) if op.effect.trains and plan.trains(op) else None


def move_gradients(plan: Plan, knobs: Knobs) -> Plan:
    """Insert gradients' movements: down after each op that adds to them, up for the next one and for the STEP."""
    if knobs.gradients == "device" or knobs.apply == "layer":
        return plan
    found = _Insertions(plan)
    uses = _uses(plan, lambda op: op.group if op.kind is Kind.STEP else _group_of(plan, op))
    for (unit, target), positions in uses.items():
        wait = Op(Kind.WAIT, target, item="gradients", unit=unit)
        for position, following in pairwise(positions):
            if found.rank[following] - found.rank[position] <= min(1, knobs.prefetch):
                continue  # used again before a movement down could end
            store = Op(Kind.STORE, target, item="gradients", unit=unit, tier=knobs.gradients)
            load = Op(Kind.LOAD, target, item="gradients", unit=unit)
            _move_down(found, position, store, wait, knobs)
            _move_up(found, following, load, wait, knobs, earliest=found.later(position, 1 + min(1, knobs.prefetch)))
    return found.result()


def move_states(plan: Plan, knobs: Knobs) -> Plan:
    """Insert the movements of optimizer states: up for a group's STEP, and down after it."""
    if knobs.states == "device":
        return plan
    found = _Insertions(plan)
    for (unit, target), (position,) in _uses(plan, lambda op: op.group if op.kind is Kind.STEP else None).items():
        wait = Op(Kind.WAIT, target, item="states", unit=unit)
        _move_up(found, position, Op(Kind.LOAD, target, item="states", unit=unit), wait, knobs, earliest=0)
        _move_down(found, position, Op(Kind.STORE, target, item="states", unit=unit, tier=knobs.states), wait, knobs)
    return found.result()


def _uses(plan: Plan, group: Callable[[Op], tuple[str, int] | None]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for position, op in enumerate(plan.ops):
        if (key := group(op)) is not None:
            found[key].append(position)
    return found


def stream_weights(plan: Plan, knobs: Knobs) -> Plan:
    """Insert FETCH / WAIT / EVICT around each run of ops that compute with a streamed layer; placement goes to the header.

    A use is a run of ops of the same layer without another streamed layer's in between (a segment's last FORWARD, its LOSS,
    its first BACKWARD). The fetch of a use begins with the use `prefetch` before it, so that at most prefetch + 1 buffers
    are taken. Where the order of layers turns round, the last `prefetch` ones are still there and are not fetched again: a
    layer is kept from one use to the next if at most `prefetch` other layers are used between.
    """
    plan = replace(plan, placement=placement_of(knobs), ring=knobs.ring)
    uses: list[tuple[int, int, int]] = []  # (layer, first position, last position)
    for position, op in enumerate(plan.ops):
        if op.kind not in RUNS_LAYER or knobs.weights[op.target] == "resident":
            continue
        if uses and uses[-1][0] == op.target:
            uses[-1] = (op.target, uses[-1][1], position)
        else:
            uses.append((op.target, position, position))
    held = _held(uses, knobs.prefetch)
    found = _Insertions(plan)
    for index, (layer, _, _) in enumerate(uses):
        if index not in held:
            begin = uses[max(0, index - knobs.prefetch)][1]
            found.before(begin, Op(Kind.FETCH, layer, unit="layer"))
    for index, (layer, first, last) in enumerate(uses):
        if index not in held:
            found.before(first, Op(Kind.WAIT, layer, unit="layer"))
        if index not in held.values():
            found.after(last, Op(Kind.EVICT, layer, unit="layer"))
    return found.result()


def _held(uses: list[tuple[int, int, int]], most_between: int) -> dict[int, int]:
    """The uses whose layer is still there: index of the use -> index of the one before it of the same layer."""
    before: dict[int, int] = {}
    held: dict[int, int] = {}
    for index, (layer, _, _) in enumerate(uses):
        if layer in before and not _more_than(most_between, (other for other, _, _ in uses[before[layer] + 1 : index])):
            held[index] = before[layer]
        before[layer] = index
    return held


def _more_than(most: int, layers: Iterable[int]) -> bool:
    """Whether there are more different layers than so many; it looks no further than it must."""
    found: set[int] = set()
    for layer in layers:
        found.add(layer)
        if len(found) > most:
            return True
    return False
