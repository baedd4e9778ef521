"""From a timeline to what a process takes: library, slack, evaluation, tiers; and that it errs upwards only."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.plan.costs.predict import (
    NEAR_BYTES,
    Prediction,
    predict,
    slack_bytes,
)
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.run.watch.memory_report import MemoryMeter
from lopt_edge.run.watch.tracker import MemoryTracker
from tests.laws.bench import make_bench, random_batch
from tests.plan.costs.test_sizes import make_facts
from tests.plan.plans import Case, cases, make_knobs

BATCH = MicroBatchSize(1, 300, 250)


def predicted(
    case: Case, batches: list[MicroBatchSize] | None = None, *, device_type: str = "cpu", rank: int = 4, **how: Any
) -> Prediction:
    n_layers = len(case.knobs.weights)
    types, kinds = ("full_attention",) * n_layers, (0,) * n_layers
    facts = replace(make_facts(), n_layers=n_layers, layer_types=types, kind_of_layer=kinds)
    shape = LayerShape(facts, 4, rank, facts.linear_names, device_type)
    return predict(case.plan, Sizes(shape, case.knobs), batches or [BATCH] * case.n_micro_batches, **how)


def plain(**changes: Any) -> Case:
    return Case("lopt", 2, 1, make_knobs(4, **changes))


def test_device_bytes_are_library_tensors_and_slack():
    found = replace(predicted(plain()), saving_bytes=0)
    assert found.library_bytes == CPU.library_bytes
    assert found.device_bytes == found.library_bytes + found.timeline.peak_bytes + found.slack_bytes
    moving = found.timeline.peak_bytes - sum(found.steady.values())
    worst = max(row.peak_bytes + round(CPU.within_share * row.within) for row in found.timeline.rows)
    assert found.slack_bytes == slack_bytes("cpu", moving) + worst - found.timeline.peak_bytes > CPU.slack_bytes
    within = max(row.within for row in found.timeline.rows)
    assert found.trim_bytes == found.device_bytes - within - NEAR_BYTES, "there the heap's holes are given back"
    on_cuda = predicted(plain(), device_type="cuda")
    moving = on_cuda.timeline.peak_bytes - sum(on_cuda.steady.values())
    assert on_cuda.slack_bytes == slack_bytes("cuda", moving)
    other = replace(predicted(plain(), library_bytes=7), saving_bytes=0)
    assert found.device_bytes - other.device_bytes == CPU.library_bytes - 7
    assert predicted(plain(), device_type="cuda").library_bytes == 0
    assert found.peak_op == found.timeline.peak_row.op.text()


def test_the_slack_does_not_depend_on_where_things_lie():
    """What lies on the heap between steps leaves holes there, and those are given back where they would exceed it."""
    for changes in ({"activations": ("page",) * 4}, {"activations": ("keep",) * 4}, {"states": "disk"}):
        found = predicted(plain(**changes))
        within = max(row.within for row in found.timeline.rows)
        assert CPU.slack_bytes <= found.slack_bytes <= CPU.slack_bytes + round(CPU.within_share * within) + 1


def test_saving_sets_the_peak_of_a_process_with_little_in_a_step():
    small = predicted(plain(weights=("disk",) * 4, states="disk"), [MicroBatchSize(1, 8, 7)])
    assert small.peak_op == "saving" and small.device_bytes == CPU.library_bytes + small.saving_bytes + small.slack_bytes
    held = small.held_at_peak
    assert sum(held.values()) == small.saving_bytes and held["saving"] == CPU.saving_bytes
    assert held["adapters"] > 0 and not {"optimizer", "gradients"} & set(held)
    assert small.ring_bytes > 0 and held["weights"] == small.steady["weights"] - small.ring_bytes
    assert small.within_peak == 0 and not small.at_loss
    assert predicted(plain(), device_type="cuda").saving_bytes == 0, "host code is not on the card"


def test_what_is_held_at_the_peak_adds_up_to_it():
    for evaluation in (None, MicroBatchSize(4, 2000, 8000)):
        found = replace(predicted(plain(), evaluation=evaluation), saving_bytes=0)
        tensors = sum(found.held_at_peak.values()) + found.within_peak
        assert found.device_bytes == found.library_bytes + tensors + found.slack_bytes
        assert found.within_peak > 0


def test_bytes_beside_the_step_are_in_every_op():
    found, more = predicted(plain()), predicted(plain(), beside_bytes=1000)
    for row, other in zip(found.timeline.rows, more.timeline.rows, strict=True):
        assert other.peak_bytes - row.peak_bytes == 1000


def test_a_large_evaluation_sets_the_peak():
    found, large, small = (
        replace(predicted(plain(), evaluation=evaluation), saving_bytes=0)  # which is more in a tiny model
        for evaluation in (None, MicroBatchSize(4, 2000, 8000), MicroBatchSize(1, 10, 9))
    )
    assert large.peak_op == "evaluation"
    assert large.device_bytes > found.device_bytes
    assert small.peak_op == found.peak_op
    assert small.device_bytes == found.device_bytes
    assert found.evaluation_bytes == 0 < small.evaluation_bytes


@pytest.mark.parametrize(
    ("dtype", "weights", "tile"),  # bfloat16 is slow on many a CPU
    [
        (torch.float32, "resident", 1024),
        (torch.float32, "disk", 1024),
        (torch.float32, "resident", 64),
        (torch.bfloat16, "resident", 1024),
        pytest.param(torch.bfloat16, "disk", 1024, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, "resident", 64, marks=pytest.mark.long),
    ],
)
def test_an_evaluation_takes_no_more_than_predicted(four_bit, tmp_path, dtype, weights, tile):
    folder: Path = four_bit("llama", hidden_size=256, intermediate_size=1408, max_position_embeddings=2048)
    knobs = make_knobs(4, weights=weights, token_tile=tile)
    bench = make_bench(folder, method="lopt", dtype=dtype, knobs=knobs, page_dir=tmp_path)
    batch = random_batch((700, 400), seed=1)
    short = random_batch((7, 4), seed=1)  # moments are there after any step, and bfloat16 is slow on many a CPU
    bench.executor.run(bench.plan, [short], step=1, learning_rates={0: 1e-3, 1: 1e-3})
    bench.evaluate([batch], token_tile=tile)
    gc.collect()
    meter = MemoryMeter(bench.executor)
    tracker = meter.tracker
    assert isinstance(tracker, MemoryTracker)
    with meter.watching([batch]):
        tracker.start_peak()
        bench.evaluate([batch], token_tile=tile)
    bench.executor.mover.close()
    shape = LayerShape(bench.model.facts, dtype.itemsize, 4, bench.model.facts.linear_names)
    sizes = Sizes(shape, knobs, vocabulary_itemsize=4)
    found = predict(bench.plan, sizes, [batch.size], evaluation=batch.size)
    taken = tracker.peak_bytes - sizes.batch_bytes(replace(batch.size, n_real=batch.n_tokens))  # its own are left out
    assert taken <= found.evaluation_bytes <= 1.2 * taken


def test_a_budget_that_is_just_enough_and_one_byte_less():
    found = predicted(plain(weights="host", states="disk", saved_inputs="disk"))
    assert min(found.device_bytes, found.host_bytes, found.disk_bytes) > 0
    enough = Budget(device_bytes=found.device_bytes, host_bytes=found.host_bytes, disk_bytes=found.disk_bytes)
    assert found.fits(enough)
    assert found.fits(Budget())
    for tier in ("device", "host", "disk"):
        short = replace(enough, **{f"{tier}_bytes": getattr(found, f"{tier}_bytes") - 1})
        assert not found.fits(short)
        (sentence,) = found.misfits(short)
        assert sentence.startswith(f"{tier} memory: ")
        assert sentence.endswith(" allowed")
    assert len(found.misfits(Budget(device_bytes=1, host_bytes=1, disk_bytes=1))) == 3


@settings(max_examples=40)
@given(cases(max_layers=4), st.integers(16, 1500), st.integers(1, 500), st.sampled_from(["cpu", "cuda"]))
def test_longer_sequences_never_take_less(case, n_tokens, more, device_type):
    short, long = ([MicroBatchSize(1, n, n - 1)] * case.n_micro_batches for n in (n_tokens, n_tokens + more))
    found, larger = (
        replace(predicted(case, batches, device_type=device_type), saving_bytes=0) for batches in (short, long)
    )
    assert found.device_bytes < larger.device_bytes
    assert found.host_bytes <= larger.host_bytes
    assert found.disk_bytes <= larger.disk_bytes


@settings(max_examples=25)
@given(cases(max_layers=4))
def test_a_higher_rank_never_takes_less(case):
    found, larger = predicted(case), predicted(case, rank=8)
    assert found.device_bytes < larger.device_bytes
    assert found.disk_bytes <= larger.disk_bytes


@settings(max_examples=40)
@given(cases(max_layers=4))
def test_every_op_adds_up(case):
    """Held bytes are never negative, and what a step leaves is what it began with: nothing leaks in the replay."""
    found = predicted(case)
    for row in found.timeline.rows:
        assert min(row.held.values()) > 0, row.op.text()
        assert min(row.within, row.host_bytes, row.disk_bytes) >= 0, row.op.text()
    first, last = found.timeline.rows[0], found.timeline.rows[-1]
    lasting = ("weights", "adapters", "aux heads", "head", "workspace")
    assert [first.held.get(name, 0) for name in lasting] == [last.held.get(name, 0) for name in lasting]
    assert last.held.get("saved inputs", 0) == 0
