"""Cuts between micro-batches: what a fresh executor must run first is what a simulation of the ops before leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.plan.schedule.cuts import cut_before, movements_before
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.ops import Plan
from tests.plan.workloads import make_workload

PLACES = st.sampled_from(["resident", "disk"])


@st.composite
def plans(draw) -> Plan:
    n_layers, n_micro = 4, draw(st.integers(1, 4))
    knobs = Knobs(
        weights=tuple(draw(PLACES) for _ in range(n_layers)),
        activations=tuple(draw(st.sampled_from(["keep", "recompute", "page"])) for _ in range(n_layers)),
        saved_inputs=draw(st.sampled_from(["device", "disk"])),
        states=draw(st.sampled_from(["device", "disk"])),
        gradients=draw(st.sampled_from(["device", "disk"])),
        pages="disk",
        prefetch=draw(st.integers(0, 3)),
    )
    workload = make_workload(
        draw(st.sampled_from(["lopt", "e2e", "frozen"])), "cpu", n_tokens=(64,) * n_micro, n_layers=n_layers
    )
    return workload.plan(knobs, n_micro_batches=n_micro)


def in_effect(ops) -> tuple[dict, dict]:
    """Layers in a buffer or on their way (waited for?), gradients below or on their way (which way, waited for?)."""
    weights, gradients = {}, {}
    for op in ops:
        if op.item == "" and op.kind in (Kind.FETCH, Kind.WAIT, Kind.EVICT):
            if op.kind is Kind.EVICT:
                del weights[op.target]
            else:
                weights[op.target] = op.kind is Kind.WAIT
        if op.item == "gradients":
            if op.kind is Kind.WAIT:
                gradients[op.group] = (*gradients[op.group][:1], True)
            else:
                gradients[op.group] = (op.kind, False)
    return weights, gradients


@given(plan=plans())
def test_the_movements_lead_to_the_same_place(plan):
    for micro_batch in range(1, plan.n_micro_batches):
        position = cut_before(plan, micro_batch)
        assert plan.ops[position].kind is Kind.EMBED and plan.ops[position].micro_batch == micro_batch
        found = movements_before(plan, position)
        weights, gradients = in_effect(plan.ops[:position])
        assert in_effect(found.of_weights) == (weights, {})
        for group, ops in found.of_gradients.items():
            assert in_effect(ops)[1] == {group: gradients[group]}
        assert set(found.of_gradients) == set(gradients)


@given(plan=plans())
def test_before_the_first_micro_batch_nothing_has_moved_but_weights(plan):
    found = movements_before(plan, cut_before(plan, 0))
    assert found.of_gradients == {}


def test_a_micro_batch_that_is_not_there():
    plan = make_workload("e2e", "cpu").plan(
        replace(Knobs(weights=("resident",) * 4, activations=("keep",) * 4)), n_micro_batches=1
    )
    with pytest.raises(ValueError, match="no micro-batch 3"):
        cut_before(plan, 3)
