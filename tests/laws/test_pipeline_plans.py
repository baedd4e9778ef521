"""The plans of a pipeline's processes: each is valid and has a text, together they are the whole; and what is refused.

Rule 9 is broken in every way that a pass could break it, and the message must name what is wrong. No plan runs here
(test_pipeline.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from lopt_edge.config.load import load_config
from lopt_edge.errors import InputError
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import ELSEWHERE
from lopt_edge.plan.schedule.ops import Op, Plan, parse_plan
from lopt_edge.plan.schedule.passes import arrange
from lopt_edge.plan.schedule.processes import cut_for_process, own_knobs, parts_of
from lopt_edge.plan.schedule.validate import PlanError, validate
from lopt_edge.planning.worst_case import plan_run
from tests.plan.plans import Case, cases, make_knobs, make_segments

# plans -----------------------------------------------------------------------------------------------------------------


def process_plans(case: Case, n: int) -> list[Plan]:
    whole = case.plain
    return [
        arrange(cut_for_process(whole, part), own_knobs(replace(case.knobs, apply="step"), part))
        for part in parts_of(whole.segments, n)
    ]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_process_has_a_valid_plan_with_a_text(case):
    case = replace(case, method="frozen" if case.method == "frozen" else "lopt")
    scope = "segment" if case.clip_scope == "global" else case.clip_scope
    for n in range(1, case.num_segments + 1):
        plans = process_plans(case, n)
        for plan in plans:
            assert parse_plan(validate(plan, clip_scope=scope).text()) == plan
        for kind in (Kind.FORWARD, Kind.LOSS, Kind.BACKWARD, Kind.STEP):
            here = [op for plan in plans for op in plan.ops if op.kind is kind]
            whole = [op for op in case.plain.ops if op.kind is kind]
            assert sorted((op.unit, op.target, op.micro_batch) for op in here) == sorted(
                (op.unit, op.target, op.micro_batch) for op in whole
            )
        boundaries = [[op.target for op in plan.ops if op.kind is Kind.SEND] for plan in plans]
        received = [[op.target for op in plan.ops if op.kind is Kind.RECV] for plan in plans]
        assert boundaries[:-1] == received[1:] and not boundaries[-1] and not received[0]


def three_plans() -> list[Plan]:
    knobs = make_knobs(6)
    segments = make_segments("lopt", n_layers=6, num_segments=4)
    whole = step_plan("lopt", segments, n_micro_batches=2)
    return [arrange(cut_for_process(whole, part), own_knobs(knobs, part)) for part in parts_of(segments, 3)]


def test_a_process_plan_in_words():
    first, middle, last = three_plans()
    assert [op.text() for op in middle.ops if op.micro_batch == 1] == [
        "RECV 4 mb=1",
        "FORWARD 4 mb=1 keep=graph",
        "SEND 5 mb=1",
        "LOSS 2 mb=1",
        "BACKWARD 4 mb=1",
    ]
    assert " own=0-1\n" in first.text() and " own=2\n" in middle.text() and f"unit layer 0 {ELSEWHERE}\n" in last.text()


def moved(plan: Plan, kind: Kind, by: int, *, micro_batch: int = 0) -> Plan:
    ops = list(plan.ops)
    position = next(i for i, op in enumerate(ops) if op.kind is kind and op.micro_batch in (micro_batch, -1))
    ops.insert(position + by, ops.pop(position))
    return replace(plan, ops=tuple(ops))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda plan: moved(plan, Kind.SEND, 1), r"rule \(9\): the output of segment 2 is not sent before its loss"),
        (lambda plan: moved(plan, Kind.SEND, -1), r"rule \(9\): micro-batch 0 is the next one to be sent"),
        (lambda plan: moved(plan, Kind.AGREE, 1), r"rule \(9\): the processes have not agreed"),
        (lambda plan: moved(plan, Kind.AGREE, -1), r"rule \(9\): the gradients of segment 2 are not complete"),
        (lambda plan: replace(plan, own=(1,)), r"rule \(9\): layer 4 is not the first one of this process"),
        (lambda plan: replace(plan, own=None), r"rule \(9\): a micro-batch does not come by RECV"),
        (lambda plan: replace(plan, ops=tuple(op for op in plan.ops if op.kind is not Kind.AGREE)), "have not agreed"),
        (lambda plan: replace(plan, ops=(Op(Kind.EMBED, micro_batch=0), *plan.ops[1:])), "does not come by EMBED"),
        (lambda plan: replace(plan, ops=(Op(Kind.RECV, 4, 1), *plan.ops[1:])), "micro-batch 0 is the next one"),
    ],
)
def test_rule_9(break_it, message):
    with pytest.raises(PlanError, match=message):
        validate(break_it(three_plans()[1]))


def test_the_planner_computes_each_process():
    whole = plan_run("llama-3.2-1b", device="cpu", num_segments=4)
    found = plan_run("llama-3.2-1b", device="cpu", num_segments=4, pipeline=4)
    assert any(note.startswith("pipeline of 4: process 0 (layers 0-3)") for note in found.notes)
    assert found.peak_bytes["device"] > whole.peak_bytes["device"]  # libraries four times
    assert sum(found.items.values()) == found.peak_bytes["device"]
    assert whole.step_seconds / 4 < found.step_seconds < whole.step_seconds


# refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"pipeline": 3}, "pipeline: 3 processes for 2 segments"),
        ({"pipeline": 3, "boundary_layers": (1,)}, "pipeline: 3 processes for 2 segments"),
        ({"method": "e2e"}, "pipeline: belongs to method lopt or frozen"),
        ({"method": "lcsb"}, "pipeline: belongs to"),
        ({"method": "top-layers", "train_layers": 1}, "pipeline: belongs to"),
        ({"open_every": 3}, "open_every: cannot be with pipeline"),
        ({"boundary_update": "fresh"}, "boundary_update: cannot be with pipeline"),
        ({"clip_scope": "global"}, "clip_scope: cannot be with pipeline"),
        ({"apply": "segment"}, "apply: cannot be with pipeline"),
        ({"device_memory": "8GB"}, "device_memory: cannot be with pipeline"),
        ({"sample_prompt": "a"}, "sample_prompt: cannot be with pipeline"),
        ({"memory_report": "a"}, "memory_report: cannot be with pipeline"),
        ({"method": "frozen", "boundary_cache": "c"}, "boundary_cache: cannot be with pipeline"),
    ],
)
def test_what_cannot_be_is_refused(changes, where):
    values = {"model": "m", "data": "d", "output": "o", "pipeline": 2, **changes}
    with pytest.raises(InputError) as caught:
        load_config(None, values)
    assert where in str(caught.value).replace("--", "").replace("-", "_").replace("top_layers", "top-layers")
    assert caught.value.exit_code == 2
