"""What is predicted from few micro-batches, against the whole step: bytes, and seconds as near as they come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.plan.costs.seconds import step_seconds
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.search.workload import Workload
from lopt_edge.system.allocator import LEAST_MMAP_BYTES, MMAP_BYTES
from tests.plan.plans import Case, cases, make_course, make_knobs
from tests.plan.workloads import make_workload

LENGTHS = st.lists(st.integers(16, 1500), min_size=5, max_size=5)


def workload_of(case: Case, machine: str, lengths: list[int], n: int, *, equal: bool, evaluates: bool) -> Workload:
    """`n` micro-batches, the longest first."""
    n_tokens = tuple(sorted(lengths, reverse=True))[: 1 if case.knobs.apply == "layer" else n]
    n_tokens = n_tokens[:1] * len(n_tokens) if equal else n_tokens
    n_layers = len(case.knobs.weights)
    made = make_workload(case.method, machine, n_layers=n_layers, n_tokens=n_tokens)
    course = make_course(case.method, n_layers=n_layers, num_segments=case.num_segments)
    return replace(made, course=course, evaluation=MicroBatchSize(1, 500, 400) if evaluates else None)


@settings(max_examples=60, deadline=None)
@given(cases(max_layers=4), st.sampled_from(["cpu", "rtx4090"]), LENGTHS, st.integers(1, 5), st.booleans(), st.booleans())
def test_few_micro_batches_predict_the_bytes_of_all(case, machine, lengths, n, equal, evaluates):
    """Exactly where they are equally long; else a whole step takes up to 1% less. Gradients on the device and moved."""
    workload = workload_of(case, machine, lengths, n, equal=equal, evaluates=evaluates)
    few, whole = (workload.predict(case.knobs, whole=whole) for whole in (False, True))
    assert (few.host_bytes, few.disk_bytes) == (whole.host_bytes, whole.disk_bytes)
    assert whole.device_bytes <= few.device_bytes <= 1.01 * whole.device_bytes
    if equal:
        assert few.device_bytes == whole.device_bytes
        assert few.peak_op.partition(" mb=")[0] == whole.peak_op.partition(" mb=")[0]


@pytest.mark.parametrize("gradients", ["device", "disk"])
def test_each_further_micro_batch_adds_its_ids_and_nothing_else(gradients):
    knobs = make_knobs(4, gradients=gradients)
    peaks = [make_workload(n_tokens=(700,) * n).predict(knobs).timeline.peak_bytes for n in (2, 3, 4)]
    ids = 8 * 700 + 16 * 699
    assert [peaks[1] - peaks[0], peaks[2] - peaks[1]] == [ids, ids]


def whole_seconds(workload: Workload, knobs: Any) -> float:
    plan = workload.arranged(knobs, len(workload.batches))
    return step_seconds(plan, workload.sizes(knobs), workload.batches, workload.profile).seconds


@pytest.mark.parametrize("n_tokens", [(700,) * 6, (900, 700, 300, 200), (1400, 60, 40, 20)])
@pytest.mark.parametrize("machine", ["cpu, slow disk"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradients": "disk"}, {"weights": "disk"}, {"activations": "page"}, {"states": "disk", "saved_inputs": "disk"},
     {"weights": "disk", "gradients": "disk", "prefetch": 0}, {"weights": "disk", "prefetch": 2}],
)  # fmt: skip
def test_few_micro_batches_predict_the_seconds_of_all(changes, machine, n_tokens):
    """Within a few percent in twelve layers. What no micro-batch by itself can know: a ring keeps its layers from one to
    the next, and a movement of the one runs beside the arithmetic of the other."""
    workload, knobs = make_workload(machine=machine, n_layers=12, n_tokens=n_tokens), make_knobs(12, **changes)
    found = workload.seconds(knobs)
    least = 1 - 1e-9 if len(set(n_tokens)) == 1 and knobs.gradients == "device" else 0.93
    assert least <= found.seconds / whole_seconds(workload, knobs) < 1.12


def test_short_micro_batches_beside_a_long_one_still_fetch_all_weights():
    """Streaming takes as long for 16 tokens as for 1,400: seconds do not grow with the tokens alone."""
    knobs = make_knobs(12, weights="disk")
    one, more = (make_workload(machine="cpu, slow disk", n_layers=12, n_tokens=n) for n in ((1400,), (1400, *(16,) * 7)))
    assert more.seconds(knobs).bytes_up > 7 * one.seconds(knobs).bytes_up
    assert more.seconds(knobs).seconds > 1.5 * one.seconds(knobs).seconds
    assert more.n_tokens < 1.1 * one.n_tokens


def test_the_plan_is_the_one_that_is_timed():
    workload, knobs = make_workload(n_tokens=(300, 200, 100)), make_knobs(4, weights="disk", gradients="disk")
    plan = workload.plan(knobs, n_micro_batches=3)
    assert plan.n_micro_batches == 3
    assert plan == workload.arranged(knobs, 3)
    assert [batch.n_tokens for batch in workload.timed(knobs)] == [300, 200, 100]
    assert [batch.n_tokens for batch in workload.timed(make_knobs(4))] == [300, 150, 150]
    assert workload.n_tokens == 600


def test_other_lengths_are_wholly_supervised():
    longer = make_workload(n_tokens=(300, 20), n_sequences=2, evaluation=MicroBatchSize(3, 50, 9)).with_tokens(64)
    assert longer.batches == (MicroBatchSize(2, 64, 126),) * 2
    assert longer.evaluation == MicroBatchSize(3, 64, 189)


@pytest.mark.parametrize(
    ("changes", "machine", "n_tokens", "expected"),
    [
        ({}, "cpu", 700, MMAP_BYTES),  # nothing but hidden states lives on: the heap does
        ({"activations": "keep"}, "cpu", 700, round(0.9 * 700 * 896 * 4)),
        ({"activations": "page"}, "cpu", 700, round(0.9 * 700 * 896 * 4)),
        ({"activations": "keep"}, "cpu", 16, LEAST_MMAP_BYTES),
        ({"activations": "keep"}, "cpu", 2000, MMAP_BYTES),
        ({"activations": "keep"}, "rtx4090", 700, MMAP_BYTES),  # of host memory: nothing is computed there
        ({"activations": ("recompute", "keep", "recompute", "keep")}, "cpu", 700, MMAP_BYTES),  # the last ones of segments
    ],
)
def test_when_a_tensor_gets_pages_of_its_own(changes, machine, n_tokens, expected):
    assert make_workload(machine=machine, n_tokens=(n_tokens,)).mmap_bytes(make_knobs(4, **changes)) == expected


@pytest.mark.parametrize("machine", ["cpu", "rtx4090"])
def test_no_draw_of_uniform_lcsb_takes_more_than_was_planned(machine):
    """Whatever layers a step draws, also where graphs are kept in some quarters only."""
    course = make_course("lcsb", n_layers=12, selection="uniform", select_ratio=0.25)
    workload = replace(make_workload("e2e", machine, n_layers=12), course=course)
    for n_kept in (0, 3, 6, 12):
        knobs = make_knobs(12, activations=("recompute",) * (12 - n_kept) + ("keep",) * n_kept)
        planned = workload.predict(knobs).device_bytes
        drawn = [workload.predict(knobs, kind=course.kind(step, 40)).device_bytes for step in range(1, 41)]
        assert max(drawn) <= planned


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_what_cannot_be_pinned_is_copied_at_pageable_rates(share):
    """A step whose movements take all the time takes what their rates say."""
    workload = make_workload(machine="rtx4090")
    slow = {"copy_up_pinned": 1e7, "copy_down_pinned": 1e7, "copy_up_pageable": 4e6, "copy_down_pageable": 4e6}
    workload = replace(workload, profile=replace(workload.profile, **slow))
    knobs = make_knobs(4, weights="host", saved_inputs="host", states="host")
    n_bytes = workload.predict(knobs).host_bytes
    free, limited = workload.seconds(knobs), replace(workload, pinned_bytes=round(share * n_bytes)).seconds(knobs)
    slower = share + (1 - share) * 1e7 / 4e6
    assert limited.bytes_moved == free.bytes_moved
    assert limited.seconds == pytest.approx(slower * free.seconds, rel=0.02)
    assert replace(workload, pinned_bytes=0).seconds(make_knobs(4)) == workload.seconds(make_knobs(4))  # nothing there
