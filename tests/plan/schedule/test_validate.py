"""The validator's rules, each shown by a valid plan that is broken in one way; and that no op of a valid plan is spare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Keep, Op, Plan
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.plan.schedule.validate import PlanError, validate
from tests.plan.plans import Case, cases, make_knobs, make_segments

Ops = list[Op]


def placement(n_layers: int) -> tuple[tuple[str, str], ...]:
    return (("embed", "disk"), *((f"layer {i}", "resident") for i in range(n_layers)), ("head", "disk"))


def make_plan(method: str = "lopt", *, n_layers: int = 4, k: int = 2, n_micro_batches: int = 1) -> Plan:
    segments = make_segments(method, n_layers=n_layers, num_segments=k)
    return step_plan(method, segments, n_micro_batches=n_micro_batches, placement=placement(n_layers))


PLAN = make_plan()
TEXTS = [op.text() for op in PLAN.ops]


def at(text: str) -> int:
    return TEXTS.index(text)


def without(text: str) -> Ops:
    return [op for op in PLAN.ops if op.text() != text]


def changed(text: str, **changes: object) -> Ops:
    return [op._replace(**changes) if op.text() == text else op for op in PLAN.ops]


def moved(text: str, *, before: str) -> Ops:
    rest = without(text)
    rest.insert([op.text() for op in rest].index(before), PLAN.ops[at(text)])
    return rest


def swapped(first: str, second: str) -> Ops:
    ops = list(PLAN.ops)
    ops[at(first)], ops[at(second)] = ops[at(second)], ops[at(first)]
    return ops


@pytest.mark.parametrize("method", ["lopt", "e2e", "frozen"])
@pytest.mark.parametrize("clip_scope", ["segment", "global"])
@pytest.mark.parametrize(("n_layers", "k", "n_micro_batches"), [(1, 1, 1), (4, 2, 1), (5, 3, 2), (4, 4, 3)])
def test_the_plans_of_all_methods_are_valid(method, clip_scope, n_layers, k, n_micro_batches):
    plan = make_plan(method, n_layers=n_layers, k=k, n_micro_batches=n_micro_batches)
    assert validate(plan, clip_scope=clip_scope) is plan


BROKEN: dict[str, tuple[int, Callable[[], Ops]]] = {
    "embedded twice": (2, lambda: [PLAN.ops[0], *PLAN.ops]),
    "never embedded": (2, lambda: without("EMBED mb=0")),
    "forwards swapped": (2, lambda: swapped("FORWARD 0 mb=0 keep=input", "FORWARD 1 mb=0 keep=graph")),
    "a forward left out": (2, lambda: without("FORWARD 0 mb=0 keep=input")),
    "nothing kept for a backward": (2, lambda: changed("FORWARD 0 mb=0 keep=input", keep=Keep.NONE)),
    "no such layer": (1, lambda: changed("BACKWARD 0 mb=0", target=9)),
    "backwards swapped": (3, lambda: swapped("BACKWARD 1 mb=0", "BACKWARD 0 mb=0")),
    "a gap in the backward": (3, lambda: without("BACKWARD 1 mb=0")),
    "backward twice": (3, lambda: [*PLAN.ops[: at("LOSS 0 mb=0") + 2], PLAN.ops[at("BACKWARD 1 mb=0")],
                                   *PLAN.ops[at("LOSS 0 mb=0") + 2 :]]),
    "no loss": (4, lambda: without("LOSS 0 mb=0")),
    "loss after its backward": (4, lambda: swapped("LOSS 0 mb=0", "BACKWARD 1 mb=0")),
    "loss before its forward ended": (4, lambda: moved("LOSS 0 mb=0", before="FORWARD 1 mb=0 keep=graph")),
    "loss taken twice": (4, lambda: [*PLAN.ops[: at("LOSS 0 mb=0") + 1], *PLAN.ops[at("LOSS 0 mb=0") :]]),
    "loss of no segment": (4, lambda: changed("LOSS 1 mb=0", target=7)),
    "a later segment begins too early": (5, lambda: moved("BACKWARD 0 mb=0", before="LOSS 1 mb=0")),
    "a saved input is left over": (6, lambda: [op for op in PLAN.ops if op.text() not in ("BACKWARD 2 mb=0", "STEP layer 2",
                                                                                          "STEP layer 3")]),
    "no step": (7, lambda: without("STEP layer 3")),
    "no step of an aux head": (7, lambda: without("STEP aux 0")),
    "two steps": (7, lambda: [*PLAN.ops, PLAN.ops[-1]]),
    "step of no layer": (7, lambda: changed("STEP layer 3", target=9)),
    "step of no aux head": (7, lambda: changed("STEP aux 0", target=1)),
    "step of neither": (7, lambda: changed("STEP layer 3", unit="")),
    "step before its gradients": (7, lambda: moved("STEP layer 2", before="BACKWARD 2 mb=0")),
    "step before the gradients of its clip norm": (7, lambda: moved("STEP layer 3", before="BACKWARD 2 mb=0")),
    "step of an aux head before the gradients of its clip norm": (7, lambda: moved("STEP aux 0", before="BACKWARD 0 mb=0")),
    "backward after its step": (7, lambda: moved("STEP layer 0", before="BACKWARD 0 mb=0")),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_broken_rule_is_named(name):
    rule, ops = BROKEN[name]
    with pytest.raises(PlanError, match=rf"rule \({rule}\)"):
        validate(replace(PLAN, ops=tuple(ops())))


# movements ------------------------------------------------------------------------------------------------------------

MOVING = Case(
    "lopt",
    2,
    2,
    make_knobs(
        4,
        weights="disk",
        activations=("recompute", "keep", "page", "keep"),
        saved_inputs="disk",
        states="disk",
        gradients="disk",
    ),
).plan
MOVING_TEXTS = [op.text() for op in MOVING.ops]


def nth(text: str) -> int:
    """`TEXT #2` is the third op with this text; without a number, the first."""
    text, _, number = text.partition(" #")
    return [i for i, found in enumerate(MOVING_TEXTS) if found == text][int(number or 0)]


def dropped(*texts: str) -> Ops:
    gone = {nth(text) for text in texts}
    return [op for i, op in enumerate(MOVING.ops) if i not in gone]


def doubled(text: str) -> Ops:
    return [*MOVING.ops[: nth(text) + 1], *MOVING.ops[nth(text) :]]


def put(text: str, *, before: str) -> Ops:
    """The op goes to an earlier or later place."""
    ops: Ops = []
    for i, op in enumerate(MOVING.ops):
        ops += [MOVING.ops[nth(text)]] if i == nth(before) else []
        ops += [op] if i != nth(text) else []
    return ops


def added(*texts: str) -> Ops:
    return [*MOVING.ops, *(MOVING.ops[nth(text)] for text in texts)]


BROKEN_MOVES: dict[str, tuple[int, Callable[[], Ops]]] = {
    "a layer is never fetched": (1, lambda: dropped("FETCH layer 3", "WAIT layer 3")),
    "the fetch is missing": (6, lambda: dropped("FETCH layer 3")),
    "the wait for a fetch is missing": (1, lambda: dropped("WAIT layer 3")),
    "the wait for a fetch comes after its use": (1, lambda: put("WAIT layer 3", before="LOSS 1 mb=0")),
    "fetched twice": (6, lambda: doubled("FETCH layer 2")),
    "fetched while it is there": (6, lambda: put("FETCH layer 0 #1", before="EVICT layer 0")),
    "more layers than the ring has buffers": (1, lambda: put("FETCH layer 2", before="EVICT layer 1")),
    "evicted twice": (6, lambda: doubled("EVICT layer 1")),
    "evicted on its way": (6, lambda: put("EVICT layer 1", before="WAIT layer 1")),
    "evicted before its backward": (1, lambda: put("EVICT layer 3", before="BACKWARD 3 mb=0")),
    "a layer is never evicted": (6, lambda: dropped("EVICT layer 2 #-1")),
    "fetched at the end": (6, lambda: added("FETCH layer 0")),
    "the saved input is not restored": (2, lambda: dropped("RESTORE 0 mb=0 #1", "WAIT input 0 mb=0 #2")),
    "the saved input is on its way": (2, lambda: dropped("WAIT input 0 mb=0 #2")),
    "the target of a local loss is below": (2, lambda: dropped("RESTORE 0 mb=0", "WAIT input 0 mb=0 #1")),
    "the target of a local loss is on its way": (2, lambda: dropped("WAIT input 0 mb=0 #1")),
    "the target of a local loss is evicted too early": (2, lambda: put("EVICT input 0 mb=0", before="LOSS 0 mb=0")),
    "spilled twice": (6, lambda: doubled("SPILL 0 mb=0 to=disk")),
    "spilled before it exists": (6, lambda: put("SPILL 0 mb=0 to=disk", before="FORWARD 0 mb=0 keep=input")),
    "the wait for a spill is missing": (6, lambda: dropped("WAIT input 0 mb=0")),
    "restored what was not spilled": (6, lambda: dropped("SPILL 0 mb=0 to=disk", "WAIT input 0 mb=0")),
    "restored twice": (6, lambda: doubled("RESTORE 0 mb=0 #1")),
    "restored while it is there": (6, lambda: dropped("EVICT input 0 mb=0")),
    "an input without a copy below is evicted": (6, lambda: put("EVICT input 0 mb=0", before="SPILL 0 mb=0 to=disk")),
    "an input is evicted twice": (6, lambda: doubled("EVICT input 0 mb=0")),
    "pages are not in": (2, lambda: dropped("PAGE_IN 2 mb=0", "WAIT pages 2 mb=0 #1")),
    "pages are on their way in": (2, lambda: dropped("WAIT pages 2 mb=0 #1")),
    "pages are on their way out": (2, lambda: dropped("WAIT pages 2 mb=0", "PAGE_IN 2 mb=0", "WAIT pages 2 mb=0 #1")),
    "paged in before they are out": (6, lambda: dropped("WAIT pages 2 mb=0")),
    "paged out twice": (6, lambda: doubled("PAGE_OUT 2 mb=0 to=disk")),
    "pages of a layer that has none": (6, lambda: put("PAGE_OUT 2 mb=0 to=disk", before="FORWARD 2 mb=0 keep=pages")),
    "states are below at the step": (7, lambda: dropped("LOAD states layer 0", "WAIT states layer 0")),
    "states are on their way at the step": (7, lambda: dropped("WAIT states layer 0")),
    "states leave before the step": (7, lambda: put("STORE states layer 0 to=disk", before="STEP layer 0")),
    "states are stored twice": (6, lambda: doubled("STORE states layer 0 to=disk")),
    "states are loaded twice": (6, lambda: doubled("LOAD states layer 0")),
    "states stay on the device": (6, lambda: added("LOAD states layer 3", "WAIT states layer 3")),
    "gradients are below at the step": (7, lambda: dropped("LOAD gradients layer 0 #1", "WAIT gradients layer 0 #3")),
    "gradients are on their way at the step": (7, lambda: dropped("WAIT gradients layer 0 #3")),
    "an aux head's gradients are below": (7, lambda: dropped("LOAD gradients aux 0 #1", "WAIT gradients aux 0 #3")),
    "gradients are below at the next backward": (7, lambda: dropped("LOAD gradients layer 0", "WAIT gradients layer 0 #1")),
    "gradients are on their way at the next backward": (7, lambda: dropped("WAIT gradients layer 0 #1")),
    "gradients are below at the next loss": (7, lambda: dropped("LOAD gradients aux 0", "WAIT gradients aux 0 #1")),
    "gradients leave before there are any": (6, lambda: put("STORE gradients layer 0 to=disk", before="BACKWARD 0 mb=0")),
    "gradients are loaded after their step": (6, lambda: added("LOAD gradients layer 3")),
    "a movement is never waited for": (6, lambda: dropped("WAIT states layer 3 #-1")),
    "a wait too many": (6, lambda: doubled("WAIT states layer 3 #-1")),
    "a wait for another micro-batch": (6, lambda: [op._replace(micro_batch=1) if i == nth("WAIT pages 2 mb=0") else op
                                                   for i, op in enumerate(MOVING.ops)]),
}  # fmt: skip


def test_the_plan_with_all_movements_is_valid():
    assert validate(MOVING) is MOVING


@pytest.mark.parametrize("name", BROKEN_MOVES)
def test_a_broken_movement_is_named(name):
    rule, ops = BROKEN_MOVES[name]
    with pytest.raises(PlanError, match=rf"rule \({rule}\)"):
        validate(replace(MOVING, ops=tuple(ops())))


def test_rule_1_a_smaller_ring_is_too_small():
    with pytest.raises(PlanError, match=r"rule \(1\): 2 streamed layers at once, the ring has 1"):
        validate(replace(MOVING, ring=1))


def test_rule_1_a_resident_layer_is_not_fetched():
    placed = tuple((unit, "resident" if unit == "layer 0" else place) for unit, place in MOVING.placement)
    with pytest.raises(PlanError, match=r"rule \(1\): layer 0 is not streamed"):
        validate(replace(MOVING, placement=placed))


def test_rule_7_states_that_never_leave_the_device_need_no_movement():
    """Without any STORE a group's states rest on the device; with one, below, and so must be loaded."""
    at_rest = tuple(op for op in MOVING.ops if op.item != "states")
    validate(replace(MOVING, ops=at_rest))
    with pytest.raises(PlanError, match=r"rule \(7\): the states of layer 0"):
        validate(replace(MOVING, ops=(*at_rest, MOVING.ops[nth("STORE states layer 0 to=disk")])))


@pytest.mark.parametrize("unit", ["embed", "layer 2", "head"])
def test_rule_1_every_unit_has_a_place(unit):
    placed = tuple(entry for entry in PLAN.placement if entry[0] != unit)
    with pytest.raises(PlanError, match=rf"rule \(1\).*{unit}"):
        validate(replace(PLAN, placement=placed))


def test_rule_7_global_clipping_needs_all_gradients_first():
    early_steps = [op for op in PLAN.ops if op.text() in ("STEP layer 0", "STEP layer 1", "STEP aux 0")]
    position = at("FORWARD 2 mb=0 keep=input")
    early = (*PLAN.ops[:position], *early_steps, *(op for op in PLAN.ops[position:] if op not in early_steps))
    validate(replace(PLAN, ops=early), clip_scope="segment")
    with pytest.raises(PlanError, match=r"rule \(7\).*segment 1"):
        validate(replace(PLAN, ops=early), clip_scope="global")


def test_rule_7_without_clipping_a_group_needs_its_own_gradients_alone():
    """A layer's end with its backward, an aux head's with its loss; not before."""
    ready = {"STEP layer 3": "BACKWARD 2 mb=0", "STEP aux 0": "BACKWARD 1 mb=0", "STEP layer 1": "BACKWARD 0 mb=0"}
    for step, before in ready.items():
        validate(replace(PLAN, ops=tuple(moved(step, before=before))), clip_scope="none")
    unready = {"STEP layer 2": "BACKWARD 2 mb=0", "STEP aux 0": "LOSS 0 mb=0", "STEP layer 1": "BACKWARD 1 mb=0"}
    for step, before in unready.items():
        with pytest.raises(PlanError, match=r"rule \(7\)"):
            validate(replace(PLAN, ops=tuple(moved(step, before=before))), clip_scope="none")


@pytest.mark.parametrize("group", [("layer", 0), ("layer", 1), ("aux", 0)])
def test_rule_7_a_frozen_segment_has_no_step_and_no_loss(group):
    plan = make_plan("frozen")
    with pytest.raises(PlanError, match=r"rule \(7\)"):
        validate(replace(plan, ops=(*plan.ops, Op(Kind.STEP, group[1], unit=group[0]))))
    position = [op.text() for op in plan.ops].index("FORWARD 2 mb=0 keep=input")
    with pytest.raises(PlanError, match=r"rule \(4\)"):
        validate(replace(plan, ops=(*plan.ops[:position], Op(Kind.LOSS, 0, 0), *plan.ops[position:])))


def test_rule_7_every_micro_batch_contributes():
    with pytest.raises(PlanError, match=r"rule \(7\)"):
        validate(replace(PLAN, n_micro_batches=2))


def test_a_micro_batch_beyond_the_window_is_refused():
    plan = make_plan(n_micro_batches=2)
    beyond = tuple(op._replace(micro_batch=7) if op.micro_batch == 1 else op for op in plan.ops)
    with pytest.raises(PlanError):
        validate(replace(plan, ops=beyond))
    extra = make_plan(n_micro_batches=3)
    with pytest.raises(PlanError):
        validate(replace(extra, n_micro_batches=2))


@pytest.mark.parametrize(
    "segments",
    [
        (Segment(0, 0, 1, "reconstruct"),),
        (Segment(0, 0, 1, "reconstruct"), Segment(1, 1, 3, "task")),
        (Segment(0, 0, 1, "reconstruct"), Segment(2, 2, 3, "task")),
        (Segment(0, 2, 3, "reconstruct"), Segment(1, 0, 1, "task")),
    ],
)
def test_segments_must_cover_the_layers(segments):
    with pytest.raises(PlanError, match="cover"):
        validate(replace(PLAN, segments=segments))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_segment_runs_its_first_and_its_last_layer(layer):
    with pytest.raises(PlanError, match="leaves out"):
        validate(replace(PLAN, segments=(Segment(0, 0, 3, "task", absent=(layer,)),)))


def test_the_message_shows_the_ops_around_the_fault():
    with pytest.raises(PlanError) as caught:
        validate(replace(PLAN, ops=tuple(without("LOSS 0 mb=0"))))
    assert ">     3  BACKWARD 1 mb=0" in str(caught.value)


@settings(deadline=None)
@given(case=cases(max_layers=6), data=st.data())
def test_no_op_of_a_valid_plan_is_spare_and_none_may_come_twice(case, data):
    """Movements included: what is left out is missed, what is done twice is noticed."""
    plan = case.plan
    position = data.draw(st.integers(0, len(plan.ops) - 1))
    for ops in (
        plan.ops[:position] + plan.ops[position + 1 :],
        plan.ops[: position + 1] + plan.ops[position:],
        (*plan.ops, plan.ops[position]),
    ):
        with pytest.raises(PlanError):
            validate(replace(plan, ops=ops), clip_scope=case.clip_scope)


WILD = st.builds(
    Op,
    kind=st.sampled_from(Kind),
    target=st.integers(-2, 9),
    micro_batch=st.integers(-1, 3),
    keep=st.sampled_from(Keep),
    item=st.sampled_from(["", "input", "pages", "states", "gradients"]),
    unit=st.sampled_from(["", "layer", "aux"]),
    tier=st.sampled_from(["", "device", "host", "disk"]),
)


@settings(deadline=None)
@given(case=cases(max_layers=4), data=st.data())
def test_any_ops_are_valid_or_a_plan_error(case, data):
    """Shuffled, or a few ops exchanged, and some with wild contents: never another exception."""
    ops = list(data.draw(st.just(case.plan.ops) | st.permutations(case.plan.ops)))
    for _ in range(data.draw(st.integers(1, 4))):
        first, second = (data.draw(st.integers(0, len(ops) - 1)) for _ in range(2))
        ops[first], ops[second] = ops[second], data.draw(WILD | st.just(ops[first]))
    try:
        validate(replace(case.plan, ops=tuple(ops)), clip_scope=data.draw(st.sampled_from(["segment", "global", "none"])))
    except PlanError as error:
        assert str(error)
