"""The clock of a step: sums that can be done by hand, and what must follow whatever the rates are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.plan.costs.seconds import FEW_ROWS, Costs, StepSeconds, step_seconds
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.facts.profile import DeviceProfile, default_cpu_profile
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import TOKEN_TILES
from lopt_edge.plan.search.workload import Workload
from tests.plan.plans import Case, cases, make_course, make_knobs
from tests.plan.workloads import make_facts, make_workload

RATES = ("unpack_rate", "memory_bandwidth", "copy_up_pinned", "copy_down_pinned", "disk_read", "disk_write",
         "attention_flops")  # fmt: skip
ENDLESS = dict.fromkeys((*RATES, "copy_up_pageable", "copy_down_pageable"), math.inf)
FACTS = make_facts("qwen2.5-0.5b", 2)
D, F, V = FACTS.hidden_size, FACTS.intermediate_size, FACTS.vocab_size
KEYS = FACTS.n_kv_heads * FACTS.head_dim
OUTSIDE, IN_MLP = 2 * D * D + 2 * D * KEYS, 3 * D * F  # weights of q, o, k, v; of the MLP
T = 10  # tokens of a micro-batch
BATCH = MicroBatchSize(1, T, T - 1)


def endless(*, overhead: float = 0.0, **finite: Any) -> DeviceProfile:
    """Everything takes no time but an op's overhead and what is named."""
    flops = dict.fromkeys(("float32", "bfloat16"), math.inf)
    values = {"matmul_flops": flops, "op_overhead_seconds": overhead, "attention_by_dtype": {}, **ENDLESS}
    return replace(default_cpu_profile(), **(values | finite))


def take(profile: DeviceProfile, *, method: Any = "lopt", n_batches: int = 1, rank: int = 1, **knobs: Any) -> StepSeconds:
    """Two layers; with `lopt` each is a segment. The adapter has the least rank there is."""
    course = make_course(method, n_layers=2, num_segments=2)
    shape = LayerShape(FACTS, 4, rank, ("q_proj",))
    workload = Workload(course, shape, (BATCH,) * n_batches, profile, 0)
    made = make_knobs(2, **knobs)
    return step_seconds(workload.arranged(made, n_batches), workload.sizes(made), workload.batches, profile)


# by hand ---------------------------------------------------------------------------------------------------------------


def test_every_op_costs_its_overhead_and_an_update_a_quarter():
    """EMBED; twice FORWARD, LOSS, BACKWARD; STEPs of two layers and of the aux head of the first."""
    assert take(endless(overhead=1.0)).seconds == 7 + 3 / 4
    assert take(endless(overhead=1.0), method="e2e").seconds == 1 + 2 + 1 + 2 + 2 / 4
    assert take(endless(overhead=1.0), method="frozen").seconds == 1 + 1 + 3 + 1 / 4
    assert take(endless(overhead=1.0), n_batches=3).seconds == 3 * 7 + 3 / 4


def layer_bytes() -> int:
    return Sizes(LayerShape(FACTS, 4, 1, ("q_proj",)), make_knobs(2)).bytes_of_layers[0]


@pytest.mark.parametrize(("prefetch", "waits"), [(0, 2.0), (1, 1.0)])
def test_a_streamed_layer_is_waited_for_unless_it_was_asked_for_early(prefetch, waits):
    """A fetch takes 1 s. Each layer is used in one piece (FORWARD, LOSS, BACKWARD); the second hides behind the first."""
    found = take(endless(overhead=1.0, disk_read=layer_bytes()), weights="disk", prefetch=prefetch)
    # the vocabulary is read at the same rate: rows for EMBED, all of it for the task's loss
    reads = (T + V) * D * 2 / layer_bytes()
    assert found.seconds == pytest.approx(7.75 + reads + waits)
    assert (found.bytes_up, found.bytes_down) == (2 * layer_bytes(), 0)
    assert found.compute_seconds == pytest.approx(7.75 + reads)


def test_matrix_products_by_hand():
    """A second for each flop. The forward multiplies once, the backward once for the inputs' gradient (in a blocked MLP it
    makes two of the three products again) and four times in the adapters; the first of e2e's two layers is recomputed. A
    product of few rows takes as long as one of FEW_ROWS more."""
    rows = T + FEW_ROWS
    adapter = 2 * D
    profile = endless(matmul_flops=dict.fromkeys(("float32", "bfloat16"), 1.0))
    forward = OUTSIDE + IN_MLP + adapter
    shape = LayerShape(FACTS, 4, 1, ("q_proj",))
    assert shape.blocked
    backward = OUTSIDE + 5 / 3 * IN_MLP + 4 * adapter
    again = OUTSIDE + adapter / 2
    loss = 2 * (rows - 1) * V * D
    assert take(profile, method="e2e").seconds == pytest.approx(2 * rows * (2 * forward + 2 * backward + again) + 2 * loss)
    kept = take(profile, method="e2e", activations="keep").seconds
    assert kept == pytest.approx(2 * rows * (2 * forward + 2 * backward) + 2 * loss)


@pytest.mark.parametrize(("tile", "n_tiles"), [(1024, 1), (9, 1), (8, 2), (3, 3), (2, 5)])
def test_each_tile_of_the_loss_reads_the_lm_head(tile, n_tiles):
    """A second for each byte read: rows for EMBED, and all of the vocabulary once a tile of the nine supervised tokens."""
    found = take(endless(disk_read=1.0), method="e2e", token_tile=tile).seconds
    assert found == pytest.approx((T + n_tiles * V) * D * 2)


def test_attention_and_unpacking_by_hand():
    """Causal attention counts once, 2 x T^2 x heads x width, and 2.5 times in the backward; the recomputation once more.
    Weights are unpacked in the forward, in the backward, and, those outside the blocked MLP, in the recomputation."""
    attention = 2 * T * T * FACTS.n_heads * FACTS.head_dim
    found = take(endless(attention_flops=1.0), method="e2e").seconds
    assert found == pytest.approx(attention * (2 + 2 * 2.5 + 1))
    assert take(endless(unpack_rate=1.0), method="e2e").seconds == pytest.approx(4 * (OUTSIDE + IN_MLP) + OUTSIDE)


# whatever the rates are ------------------------------------------------------------------------------------------------


def timed(case: Case, machine: str = "cpu", *, factor: float = 1.0, rate: str = "", n_tokens: int = 200) -> StepSeconds:
    workload = make_workload(case.method, machine, n_layers=len(case.knobs.weights), n_tokens=(n_tokens,))
    profile = workload.profile
    if rate:
        profile = replace(profile, **{rate: factor * getattr(profile, rate)})
    batches = workload.batches * case.n_micro_batches
    return step_seconds(case.plan, workload.sizes(case.knobs), batches, profile)


@settings(max_examples=50, deadline=None)
@given(cases(max_layers=5), st.sampled_from(["cpu", "rtx4090, slow link"]), st.sampled_from(RATES), st.floats(1, 100))
def test_a_faster_rate_is_never_slower(case, machine, rate, factor):
    assert timed(case, machine, factor=factor, rate=rate).seconds <= timed(case, machine).seconds * (1 + 1e-9)


def test_each_rate_matters_somewhere():
    streamed = Case(
        "lopt", 2, 2, make_knobs(4, weights="host", states="disk", gradients="disk", saved_inputs="host", prefetch=0)
    )
    paged = Case("lopt", 2, 2, make_knobs(4, activations="page", pages="disk", prefetch=0))
    for rate in RATES:
        gains = [
            timed(case, "rtx4090", rate=rate, factor=1e3).seconds < timed(case, "rtx4090").seconds
            for case in (streamed, paged)
        ]
        assert any(gains) or rate == "attention_flops", rate  # which a profile may have by dtype
    by_dtype = make_workload("lopt", "rtx4090").profile
    assert by_dtype.attention_by_dtype


@pytest.mark.parametrize("knobs", [{"weights": "disk"}, {"activations": "page"}, {"saved_inputs": "disk"}])
def test_prefetching_is_faster_where_both_arithmetic_and_movements_take_time(knobs):
    ahead, without = (Case("e2e", 1, 1, make_knobs(6, prefetch=prefetch, **knobs)) for prefetch in (1, 0))
    seconds, slower = timed(ahead, "cpu, slow disk"), timed(without, "cpu, slow disk")
    assert seconds.seconds < 0.99 * slower.seconds
    assert seconds.compute_seconds == pytest.approx(slower.compute_seconds)
    assert slower.seconds > slower.compute_seconds


@settings(max_examples=30, deadline=None)
@given(cases(max_layers=5), st.integers(2, 5))
def test_more_micro_batches_take_as_many_times_their_arithmetic(case, n):
    if case.knobs.apply == "layer":
        return
    first, many = (timed(replace(case, n_micro_batches=k)) for k in (1, n))
    updates = first.compute_seconds - arithmetic_of_passes(case)
    assert many.compute_seconds == pytest.approx(n * (first.compute_seconds - updates) + updates)
    assert first.seconds < many.seconds


def arithmetic_of_passes(case: Case) -> float:
    plan = replace(case, n_micro_batches=1).plan
    passes = replace(plan, ops=tuple(op for op in plan.ops if op.kind is not Kind.STEP))
    workload = make_workload(case.method, n_layers=plan.n_layers, n_tokens=(200,))
    return step_seconds(passes, workload.sizes(case.knobs), workload.batches, workload.profile).compute_seconds


@settings(max_examples=30, deadline=None)
@given(cases(max_layers=5))
def test_keeping_is_not_slower_than_recomputing(case):
    n_layers = len(case.knobs.weights)
    kept, again = (
        replace(case, knobs=replace(case.knobs, activations=(word,) * n_layers, saved_inputs="device"))
        for word in ("keep", "recompute")
    )
    assert timed(kept).seconds <= timed(again).seconds * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(cases(max_layers=5), st.sampled_from(["cpu", "rtx4090, slow link"]), st.integers(16, 3000))
def test_a_smaller_tile_is_never_faster(case, machine, n_tokens):
    """Its arithmetic takes longer; the step may not, where it waits for movements."""
    found = [
        timed(replace(case, knobs=replace(case.knobs, token_tile=tile)), machine, n_tokens=n_tokens) for tile in TOKEN_TILES
    ]
    seconds, computing = ([getattr(one, name) for one in found] for name in ("seconds", "compute_seconds"))
    assert seconds == sorted(seconds) and computing == sorted(computing)
    assert len(set(computing)) == (1 if n_tokens <= 257 else 2 if n_tokens <= 513 else 3)


@settings(max_examples=40, deadline=None)
@given(cases(max_layers=5))
def test_bytes_moved_are_the_sum_of_the_plans_movements(case):
    found, plan = timed(case), case.plan
    workload = make_workload(case.method, n_layers=plan.n_layers, n_tokens=(200,))
    costs = Costs(workload.sizes(case.knobs), workload.batches * case.n_micro_batches, workload.profile)
    ways = ((Kind.FETCH, Kind.RESTORE, Kind.PAGE_IN, Kind.LOAD), (Kind.SPILL, Kind.PAGE_OUT, Kind.STORE))
    up, down = (sum(costs.moved_bytes(op, plan) for op in plan.ops if op.kind in kinds) for kinds in ways)
    assert (found.bytes_up, found.bytes_down, found.bytes_moved) == (up, down, up + down)
    assert found.compute_seconds <= found.seconds * (1 + 1e-9)


def test_experts_cost_what_tokens_go_to():
    """Of 128 experts one token goes to 8; 2,048 go to all. A pass unpacks each once, and a backward does so again."""
    facts = make_facts("qwen3-30b-a3b", 1)
    kind = facts.kinds[0]
    assert kind.experts is not None
    outside = kind.n_packed - kind.experts.count * kind.experts.n_packed
    sizes = Sizes(LayerShape(facts, 4, 1, ("q_proj",)), make_knobs(1))
    for n_tokens, n_experts in ((1, 8), (2048, 128)):
        batch = MicroBatchSize(1, n_tokens, max(1, n_tokens - 1))
        found = Costs(sizes, [batch], endless(unpack_rate=1e9)).layer(0, batch)
        assert found.forward == pytest.approx((outside + n_experts * kind.experts.n_packed) / 1e9, rel=1e-3)
        assert found.backward == pytest.approx(found.forward) and found.again == pytest.approx(outside / 1e9)
        products = Costs(sizes, [batch], endless(matmul_flops={"float32": 1e12, "bfloat16": 1e12})).layer(0, batch)
        rows = n_tokens * 8 + FEW_ROWS * n_experts
        least = 2 * ((n_tokens + FEW_ROWS) * outside + rows * kind.experts.n_packed) / 1e12
        assert least <= products.forward <= 1.01 * least + 1e-4
