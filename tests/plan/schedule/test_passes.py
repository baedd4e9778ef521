"""Passes: whatever the knobs say, the plan does the same work, breaks no rule and holds no more than it may.

First as laws over random methods, shapes and knobs; then as plans written out, so that a person can see what a knob does.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from lopt_edge.plan.schedule.effects import COMPUTE, Kind
from lopt_edge.plan.schedule.ops import Keep, Op, Plan, parse_plan
from lopt_edge.plan.schedule.passes import arrange
from lopt_edge.plan.schedule.validate import validate
from tests.plan.plans import Case, cases, make_knobs

BEGINS = (Kind.FETCH, Kind.SPILL, Kind.RESTORE, Kind.PAGE_OUT, Kind.PAGE_IN, Kind.LOAD, Kind.STORE)
DOWNWARD = (Kind.SPILL, Kind.PAGE_OUT, Kind.STORE)


def work(plan: Plan) -> list[str]:
    """What the plan computes, but for what it keeps and when it updates."""
    return [op.text().partition(" keep=")[0] for op in plan.ops if op.kind in COMPUTE and op.kind is not Kind.STEP]


def steps(plan: Plan) -> list[str]:
    return [op.text() for op in plan.ops if op.kind is Kind.STEP]


def count(plan: Plan, kind: Kind, **fields: object) -> int:
    return sum(op.kind is kind and all(getattr(op, name) == value for name, value in fields.items()) for op in plan.ops)


def thing_of(op: Op) -> tuple[str, str, int, int]:
    """What a movement or its WAIT names: (item, unit, target, micro-batch)."""
    items = {Kind.SPILL: "input", Kind.RESTORE: "input", Kind.PAGE_OUT: "pages", Kind.PAGE_IN: "pages"}
    return items.get(op.kind, op.item), op.unit, op.target, op.micro_batch


def waits(plan: Plan) -> dict[int, int]:
    """Position of each movement's beginning -> of its end."""
    found: dict[int, int] = {}
    open_: dict[tuple, int] = {}
    for position, op in enumerate(plan.ops):
        if op.kind in BEGINS:
            assert thing_of(op) not in open_
            open_[thing_of(op)] = position
        elif op.kind is Kind.WAIT:
            found[open_.pop(thing_of(op))] = position
    assert not open_
    return found


def computed_between(plan: Plan, begin: int, end: int, *, steps_too: bool) -> int:
    return sum(op.kind in COMPUTE and (steps_too or op.kind is not Kind.STEP) for op in plan.ops[begin:end])


# laws -----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(cases())
def test_every_arranged_plan_is_valid_and_comes_back_from_its_text(case):
    plan = validate(case.plan, clip_scope=case.clip_scope)
    assert parse_plan(plan.text()) == plan


@settings(deadline=None)
@given(cases())
def test_the_same_work_in_the_same_order(case):
    assert work(case.plan) == work(case.plain)
    assert sorted(steps(case.plan)) == sorted(steps(case.plain))
    if case.knobs.apply == "step":
        assert steps(case.plan) == steps(case.plain)
    assert [op.kind for op in case.plan.ops if op.kind not in (*BEGINS, *COMPUTE, Kind.WAIT, Kind.EVICT)] == []


@settings(deadline=None, max_examples=100)
@given(cases())
def test_streamed_layers_never_take_more_buffers_than_the_ring_has(case):
    """A buffer is taken from the beginning of FETCH to EVICT."""
    plan, taken, fetched = case.plan, set(), set()
    assert plan.ring == case.knobs.ring
    for op in plan.ops:
        if op.kind is Kind.FETCH:
            taken.add(op.target)
            fetched.add(op.target)
        if op.kind is Kind.EVICT and op.unit == "layer":
            taken.remove(op.target)
        assert len(taken) <= plan.ring
        if op.kind in (Kind.FORWARD, Kind.BACKWARD):
            assert (op.target in taken) == (case.knobs.weights[op.target] != "resident")
    assert not taken
    assert fetched == {layer for layer, place in enumerate(case.knobs.weights) if place != "resident"}


@settings(deadline=None)
@given(cases())
def test_nothing_that_prefetch_forbids_overlaps(case):
    """With prefetch 0 a movement ends before the next op computes; else a movement down ends after the next one, and a
    movement up begins at most `prefetch` ops before its use (early STEPs, which are put in later, do not count there)."""
    plan = case.plan
    for begin, end in waits(plan).items():
        steps_too = plan.ops[begin].item in ("states", "gradients") or case.knobs.prefetch == 0
        between, kind = computed_between(plan, begin, end, steps_too=steps_too), plan.ops[begin].kind
        if case.knobs.prefetch == 0:
            assert between == 0, plan.around(begin)
        elif kind in DOWNWARD:
            assert between <= 1, plan.around(begin)
        elif kind is not Kind.FETCH:  # a use of weights is a run of ops
            assert between <= case.knobs.prefetch, plan.around(begin)


@settings(deadline=None)
@given(cases())
def test_activations_lie_where_the_knobs_say(case):
    """A paged layer's graph goes out and in once and no input of it is saved; likewise the others."""
    plan, last = case.plan, {segment.last for segment in case.plain.segments}
    kept = {"keep": Keep.GRAPH, "recompute": Keep.INPUT, "page": Keep.PAGES}
    n_inputs = n_pages = 0
    for op in plan.ops:
        if op.kind is Kind.FORWARD:
            trains = plan.segment_of(op.target).loss != "none"
            choice = Keep.GRAPH if op.target in last else kept[case.knobs.activations[op.target]]
            assert op.keep is (choice if trains else Keep.NONE)
            n_inputs += op.keep is Keep.INPUT
            n_pages += op.keep is Keep.PAGES
            moved = [
                thing_of(other)[0]
                for other in plan.ops
                if other.kind in (Kind.PAGE_OUT, Kind.PAGE_IN, Kind.SPILL, Kind.RESTORE)
                and (other.target, other.micro_batch) == (op.target, op.micro_batch)
            ]
            assert set(moved) <= {Keep.PAGES: {"pages"}, Keep.INPUT: {"input"}}.get(op.keep, set())
    assert count(plan, Kind.PAGE_OUT, tier=case.knobs.pages) == count(plan, Kind.PAGE_IN) == n_pages
    n_targets = sum(
        op.keep is Keep.INPUT
        and op.target == (segment := plan.segment_of(op.target)).first
        and segment.loss == "reconstruct"
        for op in plan.ops
    )
    if case.knobs.saved_inputs == "device":
        n_inputs = n_targets = 0
    assert count(plan, Kind.SPILL) == count(plan, Kind.SPILL, tier=case.knobs.saved_inputs) == n_inputs
    assert count(plan, Kind.RESTORE) == n_inputs + n_targets
    assert count(plan, Kind.EVICT, item="input") == n_targets


@settings(deadline=None)
@given(cases())
def test_states_and_gradients_lie_where_the_knobs_say(case):
    plan, knobs = case.plan, case.knobs
    groups = Counter(op.group for op in plan.ops if op.kind is Kind.STEP)
    for item, tier in (("states", knobs.states), ("gradients", knobs.gradients)):
        loads = Counter(op.group for op in plan.ops if op.kind is Kind.LOAD and op.item == item)
        stores = Counter(op.group for op in plan.ops if op.kind is Kind.STORE and op.item == item)
        assert loads == stores, "what goes down comes up"
        assert count(plan, Kind.STORE, item=item) == count(plan, Kind.STORE, item=item, tier=tier)
        if tier == "device" or (item == "gradients" and knobs.apply == "layer"):
            assert not loads
        elif item == "states":
            assert loads == groups
        else:
            assert set(loads) <= set(groups) and max(loads.values(), default=0) <= case.n_micro_batches


@settings(deadline=None)
@given(cases())
def test_early_steps_come_as_soon_as_the_knob_says(case):
    """`layer`: right after the op that completes the group's gradients. `segment`: after its first layer's backward."""
    computes = [op for op in case.plan.ops if op.kind in COMPUTE]
    for position, op in enumerate(computes):
        if op.kind is not Kind.STEP:
            continue
        before = next(other for other in reversed(computes[:position]) if other.kind is not Kind.STEP)
        segment = case.plan.segments[op.target] if op.unit == "aux" else case.plan.segment_of(op.target)
        if case.knobs.apply == "layer":
            kind = Kind.LOSS if op.unit == "aux" else Kind.BACKWARD
            assert (before.kind, before.target) == (kind, op.target)
        elif case.knobs.apply == "segment":
            assert (before.kind, before.target) == (Kind.BACKWARD, segment.first)
        assert before.micro_batch == case.n_micro_batches - 1


@settings(deadline=None)
@given(cases())
def test_knobs_that_leave_all_on_the_device_move_nothing(case):
    knobs = make_knobs(len(case.knobs.weights), prefetch=case.knobs.prefetch)
    plan = arrange(case.plain, knobs)
    assert plan.ops == case.plain.ops and plan.ring == 0


# plans written out ----------------------------------------------------------------------------------------------------


def ops_of(method: str, n_layers: int, *, num_segments: int = 1, n_micro_batches: int = 1, **knobs: object) -> list[str]:
    case = Case(method, num_segments, n_micro_batches, make_knobs(n_layers, **knobs))
    return [op.text() for op in validate(case.plan, clip_scope="none").ops]


def test_streamed_weights_with_prefetch_1():
    """Two buffers: the next layer comes while one computes; where the order turns round, layer 1 is still there."""
    assert ops_of("e2e", 3, weights="disk", prefetch=1) == [
        "EMBED mb=0",
        "FETCH layer 0",
        "FETCH layer 1",
        "WAIT layer 0",
        "FORWARD 0 mb=0 keep=input",
        "EVICT layer 0",
        "FETCH layer 2",
        "WAIT layer 1",
        "FORWARD 1 mb=0 keep=input",
        "WAIT layer 2",
        "FORWARD 2 mb=0 keep=graph",
        "LOSS 0 mb=0",
        "BACKWARD 2 mb=0",
        "EVICT layer 2",
        "FETCH layer 0",
        "BACKWARD 1 mb=0",
        "EVICT layer 1",
        "WAIT layer 0",
        "BACKWARD 0 mb=0",
        "EVICT layer 0",
        "STEP layer 0",
        "STEP layer 1",
        "STEP layer 2",
    ]


def test_streamed_weights_without_prefetch():
    """One buffer: every layer is fetched when it is needed and gone after it; the resident one is not touched."""
    assert ops_of("e2e", 3, weights=("disk", "resident", "disk"), prefetch=0) == [
        "EMBED mb=0",
        "FETCH layer 0",
        "WAIT layer 0",
        "FORWARD 0 mb=0 keep=input",
        "EVICT layer 0",
        "FORWARD 1 mb=0 keep=input",
        "FETCH layer 2",
        "WAIT layer 2",
        "FORWARD 2 mb=0 keep=graph",
        "LOSS 0 mb=0",
        "BACKWARD 2 mb=0",
        "EVICT layer 2",
        "BACKWARD 1 mb=0",
        "FETCH layer 0",
        "WAIT layer 0",
        "BACKWARD 0 mb=0",
        "EVICT layer 0",
        "STEP layer 0",
        "STEP layer 1",
        "STEP layer 2",
    ]


def test_weights_that_go_round_are_not_held_beyond_the_ring():
    """Frozen layers run forward only: in the next micro-batch layer 0 follows layer 3, with three others between."""
    ops = ops_of("frozen", 4, num_segments=4, n_micro_batches=2, weights="disk", prefetch=2)
    assert ops.count("FETCH layer 0") == 2
    assert ops.count("EVICT layer 0") == 2


def test_spilled_inputs_of_a_lopt_plan():
    """Segment 0's input is its local loss's target too: it comes up for the loss, goes, and comes up for the backward."""
    assert ops_of("lopt", 4, num_segments=2, saved_inputs="disk")[:-5] == [
        "EMBED mb=0",
        "FORWARD 0 mb=0 keep=input",
        "SPILL 0 mb=0 to=disk",
        "FORWARD 1 mb=0 keep=graph",
        "WAIT input 0 mb=0",
        "RESTORE 0 mb=0",
        "WAIT input 0 mb=0",
        "LOSS 0 mb=0",
        "EVICT input 0 mb=0",
        "RESTORE 0 mb=0",
        "BACKWARD 1 mb=0",
        "WAIT input 0 mb=0",
        "BACKWARD 0 mb=0",
        "FORWARD 2 mb=0 keep=input",
        "SPILL 2 mb=0 to=disk",
        "FORWARD 3 mb=0 keep=graph",
        "WAIT input 2 mb=0",
        "LOSS 1 mb=0",
        "RESTORE 2 mb=0",
        "BACKWARD 3 mb=0",
        "WAIT input 2 mb=0",
        "BACKWARD 2 mb=0",
    ]


def test_paged_activations():
    """Layer 0's graph goes out during layer 1's forward and comes in during its backward."""
    assert ops_of("e2e", 3, activations=("page", "recompute", "recompute"), pages="host")[:-3] == [
        "EMBED mb=0",
        "FORWARD 0 mb=0 keep=pages",
        "PAGE_OUT 0 mb=0 to=host",
        "FORWARD 1 mb=0 keep=input",
        "WAIT pages 0 mb=0",
        "FORWARD 2 mb=0 keep=graph",
        "LOSS 0 mb=0",
        "BACKWARD 2 mb=0",
        "PAGE_IN 0 mb=0",
        "BACKWARD 1 mb=0",
        "WAIT pages 0 mb=0",
        "BACKWARD 0 mb=0",
    ]


def test_states_on_disk():
    """One group's states come up while the group before is updated and goes down."""
    assert ops_of("e2e", 2, states="disk")[4:] == [
        "BACKWARD 1 mb=0",
        "LOAD states layer 0",
        "BACKWARD 0 mb=0",
        "WAIT states layer 0",
        "LOAD states layer 1",
        "STEP layer 0",
        "STORE states layer 0 to=disk",
        "WAIT states layer 1",
        "STEP layer 1",
        "WAIT states layer 0",
        "STORE states layer 1 to=disk",
        "WAIT states layer 1",
    ]


def test_gradients_on_disk_with_two_micro_batches():
    """They wait below between the micro-batches and before the update; the last backward's are used at once."""
    assert ops_of("e2e", 2, n_micro_batches=2, gradients="disk") == [
        "EMBED mb=0",
        "FORWARD 0 mb=0 keep=input",
        "FORWARD 1 mb=0 keep=graph",
        "LOSS 0 mb=0",
        "BACKWARD 1 mb=0",
        "STORE gradients layer 1 to=disk",
        "BACKWARD 0 mb=0",
        "WAIT gradients layer 1",
        "STORE gradients layer 0 to=disk",
        "EMBED mb=1",
        "WAIT gradients layer 0",
        "FORWARD 0 mb=1 keep=input",
        "FORWARD 1 mb=1 keep=graph",
        "LOAD gradients layer 1",
        "LOSS 0 mb=1",
        "WAIT gradients layer 1",
        "LOAD gradients layer 0",
        "BACKWARD 1 mb=1",
        "STORE gradients layer 1 to=disk",
        "WAIT gradients layer 0",
        "BACKWARD 0 mb=1",
        "WAIT gradients layer 1",
        "LOAD gradients layer 1",
        "STEP layer 0",
        "WAIT gradients layer 1",
        "STEP layer 1",
    ]


def test_apply_layer():
    """Every group is updated right after the op that made its gradients."""
    assert ops_of("lopt", 4, num_segments=2, apply="layer") == [
        "EMBED mb=0",
        "FORWARD 0 mb=0 keep=input",
        "FORWARD 1 mb=0 keep=graph",
        "LOSS 0 mb=0",
        "STEP aux 0",
        "BACKWARD 1 mb=0",
        "STEP layer 1",
        "BACKWARD 0 mb=0",
        "STEP layer 0",
        "FORWARD 2 mb=0 keep=input",
        "FORWARD 3 mb=0 keep=graph",
        "LOSS 1 mb=0",
        "BACKWARD 3 mb=0",
        "STEP layer 3",
        "BACKWARD 2 mb=0",
        "STEP layer 2",
    ]


def test_apply_segment_with_states_on_disk():
    """The first segment's states are gone before the second's are needed."""
    ops = ops_of("lopt", 2, num_segments=2, apply="segment", states="disk", prefetch=0)
    assert ops == [
        "EMBED mb=0",
        "FORWARD 0 mb=0 keep=graph",
        "LOSS 0 mb=0",
        "BACKWARD 0 mb=0",
        "LOAD states layer 0",
        "WAIT states layer 0",
        "STEP layer 0",
        "STORE states layer 0 to=disk",
        "WAIT states layer 0",
        "LOAD states aux 0",
        "WAIT states aux 0",
        "STEP aux 0",
        "STORE states aux 0 to=disk",
        "WAIT states aux 0",
        "FORWARD 1 mb=0 keep=graph",
        "LOSS 1 mb=0",
        "BACKWARD 1 mb=0",
        "LOAD states layer 1",
        "WAIT states layer 1",
        "STEP layer 1",
        "STORE states layer 1 to=disk",
        "WAIT states layer 1",
    ]


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_tier_is_written_into_the_movement(tier):
    for knob in ("saved_inputs", "pages", "states", "gradients"):
        activations = ("page", "keep", "keep") if knob == "pages" else "recompute"
        plan = Case("e2e", 1, 2, make_knobs(3, activations=activations, **{knob: tier})).plan
        assert {op.tier for op in plan.ops if op.kind in DOWNWARD} == {tier}, knob
        assert not any(op.tier for op in plan.ops if op.kind not in DOWNWARD)
