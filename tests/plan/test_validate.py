"""The validator's rules, each shown by a valid plan that is broken in one way; and that no op of a valid plan is spare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.plan.methods import step_plan
from lopt_edge.plan.ops import Keep, Kind, Op, Plan
from lopt_edge.plan.segments import Segment, make_segments
from lopt_edge.plan.validate import PlanError, validate

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
    return [replace(op, **changes) if op.text() == text else op for op in PLAN.ops]


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
    "a saved input is left over": (6, lambda: [op for op in PLAN.ops if op.text() not in ("BACKWARD 2 mb=0", "STEP 1")]),
    "no step": (7, lambda: without("STEP 1")),
    "two steps": (7, lambda: [*PLAN.ops, PLAN.ops[-1]]),
    "step of no segment": (7, lambda: changed("STEP 1", target=2)),
    "step before its gradients": (7, lambda: moved("STEP 1", before="BACKWARD 2 mb=0")),
    "backward after its step": (7, lambda: moved("STEP 0", before="BACKWARD 0 mb=0")),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_broken_rule_is_named(name):
    rule, ops = BROKEN[name]
    with pytest.raises(PlanError, match=rf"rule \({rule}\)"):
        validate(replace(PLAN, ops=tuple(ops())))


@pytest.mark.parametrize("unit", ["embed", "layer 2", "head"])
def test_rule_1_every_unit_has_a_place(unit):
    placed = tuple(entry for entry in PLAN.placement if entry[0] != unit)
    with pytest.raises(PlanError, match=rf"rule \(1\).*{unit}"):
        validate(replace(PLAN, placement=placed))


def test_rule_7_global_clipping_needs_all_gradients_first():
    early = tuple(moved("STEP 0", before="FORWARD 2 mb=0 keep=input"))
    validate(replace(PLAN, ops=early), clip_scope="segment")
    with pytest.raises(PlanError, match=r"rule \(7\).*segment 1"):
        validate(replace(PLAN, ops=early), clip_scope="global")


def test_rule_7_a_frozen_segment_has_no_step_and_no_loss():
    plan = make_plan("frozen")
    with pytest.raises(PlanError, match=r"rule \(7\)"):
        validate(replace(plan, ops=(*plan.ops, Op(Kind.STEP, 0))))
    position = [op.text() for op in plan.ops].index("FORWARD 2 mb=0 keep=input")
    with pytest.raises(PlanError, match=r"rule \(4\)"):
        validate(replace(plan, ops=(*plan.ops[:position], Op(Kind.LOSS, 0, 0), *plan.ops[position:])))


def test_rule_7_every_micro_batch_contributes():
    with pytest.raises(PlanError, match=r"rule \(7\)"):
        validate(replace(PLAN, n_micro_batches=2))


def test_a_micro_batch_beyond_the_window_is_refused():
    plan = make_plan(n_micro_batches=2)
    beyond = tuple(replace(op, micro_batch=7) if op.micro_batch == 1 else op for op in plan.ops)
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


def test_the_message_shows_the_ops_around_the_fault():
    with pytest.raises(PlanError) as caught:
        validate(replace(PLAN, ops=tuple(without("LOSS 0 mb=0"))))
    assert ">     3  BACKWARD 1 mb=0" in str(caught.value)


CASES = st.tuples(st.sampled_from(["lopt", "e2e", "frozen"]), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(case=CASES, data=st.data())
def test_no_op_of_a_valid_plan_is_spare_and_none_may_come_twice(case, data):
    method, n_layers, k, n_micro_batches = case
    plan = make_plan(method, n_layers=n_layers, k=min(k, n_layers), n_micro_batches=n_micro_batches)
    position = data.draw(st.integers(0, len(plan.ops) - 1))
    for ops in (
        plan.ops[:position] + plan.ops[position + 1 :],
        plan.ops[: position + 1] + plan.ops[position:],
        (*plan.ops, plan.ops[position]),
    ):
        with pytest.raises(PlanError):
            validate(replace(plan, ops=ops))


@settings(deadline=None)
@given(case=CASES, data=st.data())
def test_any_ops_are_valid_or_a_plan_error(case, data):
    """Shuffled, and with wild targets: never another exception."""
    method, n_layers, k, n_micro_batches = case
    plan = make_plan(method, n_layers=n_layers, k=min(k, n_layers), n_micro_batches=n_micro_batches)
    ops = data.draw(st.permutations(plan.ops))
    wild = st.builds(Op, st.sampled_from(Kind), st.integers(-2, 9), st.integers(-1, 3), st.sampled_from(Keep))
    ops = [data.draw(wild) if data.draw(st.integers(0, 9)) == 0 else op for op in ops]
    try:
        validate(replace(plan, ops=tuple(ops)), clip_scope=data.draw(st.sampled_from(["segment", "global"])))
    except PlanError as error:
        assert str(error)
