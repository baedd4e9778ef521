"""Faults inside a step: the plan around the op is shown, nothing is updated, nothing is left over for the next step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from lopt_edge.errors import RunError
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.ops import Keep, Op
from tests.laws.bench import Bench, make_bench, random_batch

BATCH = random_batch((9, 6))
RATES = {0: 1e-2, 1: 1e-2}
ON_DISK = {
    "weights": ("disk",) * 4,
    "activations": ("page", "keep", "recompute", "keep"),
    "saved_inputs": "disk",
    "states": "disk",
    "gradients": "disk",
}
WHERE = [{}, ON_DISK, {**ON_DISK, "prefetch": 3}]


def bench_with(folder: Path, page_dir: Path, knobs: dict[str, object], **settings: object) -> Bench:
    values = {"weights": ("resident",) * 4, "activations": ("recompute",) * 4, **knobs}
    return make_bench(folder, knobs=Knobs(**values), page_dir=page_dir, **settings)


def values(bench: Bench) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in bench.names().items()}


def assert_untouched(bench: Bench, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in bench.names().items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    assert not bench.model.clock.active


def run(bench: Bench, *, step: int = 1, batches=None) -> object:
    return bench.executor.run(bench.plan, batches or [BATCH], step=step, learning_rates=RATES)


@pytest.mark.parametrize(
    ("layer", "op"), [(0, "FORWARD 0 mb=0 keep=input"), (1, "FORWARD 1 mb=0 keep=graph"), (3, "FORWARD 3 mb=0 keep=graph")]
)
def test_an_error_inside_an_op_shows_the_plan_around_it(four_bit, layer, op):
    """A weight that is gone: the op, the step and its neighbours are named, the cause is kept."""
    bench = make_bench(four_bit())
    before = values(bench)
    module = bench.model.layers[layer].self_attn.q_proj
    weight, module.weight = module.weight, None
    with pytest.raises(RunError, match="not resident") as caught:
        run(bench, step=17)
    text = str(caught.value)
    position = [found.text() for found in bench.plan.ops].index(op)
    assert f"step 17, op {position} ({op})" in text
    assert f"> {position:5d}  {op}" in text
    assert bench.plan.ops[position + 1].text() in text
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_untouched(bench, before)
    module.weight = weight
    run(bench)  # the next step runs as if nothing had been


def test_an_error_in_the_backward_is_told_too(four_bit):
    bench = make_bench(four_bit())
    before = values(bench)
    bench.model.layers[0].self_attn.o_proj.lora_a.register_hook(lambda grad: 1 / 0)
    with pytest.raises(RunError, match=r"(?s)ZeroDivisionError.*> +5  BACKWARD 0 mb=0"):
        run(bench)
    assert_untouched(bench, before)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_nan_in_the_weights_updates_nothing_anywhere(four_bit, layer):
    """Also not in the segment whose own gradients are finite."""
    bench = make_bench(four_bit())
    run(bench)
    before = values(bench)
    norm = bench.model.layers[layer].post_attention_layernorm.weight
    good = norm.data.clone()
    norm.data[3] = torch.nan
    with pytest.raises(RunError, match=r"(?s)not finite.*> +\d+  LOSS"):
        run(bench, step=2)
    assert_untouched(bench, before)
    norm.data.copy_(good)
    run(bench, step=2)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in bench.names().items())


@pytest.mark.parametrize("n_before", [0, 1])
@pytest.mark.parametrize("knobs", WHERE)
def test_a_failed_step_leaves_no_trace_in_the_next(four_bit, tmp_path, knobs, n_before):
    """A good step after a failed one equals the good step alone, bitwise; wherever things lie, also as the first step."""
    clean, bench = make_bench(four_bit()), bench_with(four_bit(), tmp_path, knobs)
    for step in range(n_before):
        assert run(bench, step=step) == run(clean, step=step)
    norm = bench.model.layers[3].post_attention_layernorm.weight
    good = norm.data.clone()
    norm.data[3] = torch.nan
    with pytest.raises(RunError, match="not finite") as caught:
        run(bench, step=n_before)
    assert caught.value.values_intact
    norm.data.copy_(good)
    ours, theirs = run(bench, step=n_before), run(clean, step=n_before)
    assert ours == theirs
    for name, parameter in clean.names().items():
        assert torch.equal(parameter, bench.names()[name]), name


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("knobs", WHERE)
def test_a_fault_in_a_backward_leaves_no_page_and_no_buffer_behind(four_bit, tmp_path, knobs, layer):
    bench = bench_with(four_bit(), tmp_path, knobs, n_micro_batches=2)
    batches = [BATCH, random_batch((5, 8), seed=4)]
    run(bench, batches=batches)
    before, used = values(bench), bench.executor.mover.page_file.used_bytes
    hook = bench.model.layers[layer].self_attn.o_proj.lora_a.register_hook(lambda grad: 1 / 0)
    with pytest.raises(RunError, match="ZeroDivisionError"):
        run(bench, step=2, batches=batches)
    assert_untouched(bench, before)
    assert bench.executor.mover.page_file.used_bytes == used, "states and journals; no page, input or gradient"
    hook.remove()
    run(bench, step=2, batches=batches)
    assert bench.model.weights.n_slots <= bench.plan.ring


def overflow_in_segment_1(bench: Bench) -> None:
    """The loss scale is too large for the task's gradients, the local loss's (with next to no weight) bear it."""
    bench.executor.loss_scale, bench.executor.losses.local_weight = 2.0**130, 1e-12


@pytest.mark.parametrize("states", ["device", "disk"])
@pytest.mark.parametrize("apply", ["segment", "layer"])
def test_an_overflow_after_an_early_update_is_not_run_again(four_bit, tmp_path, apply, states):
    """A lower loss scale and another run would update segment 0 twice. Values are rolled back where that is possible, their
    moments never, so the run cannot go on from here."""
    bench = bench_with(four_bit(), tmp_path, {"apply": apply, "states": states}, clip=0.0)
    overflow_in_segment_1(bench)
    before = values(bench)
    with pytest.raises(RunError, match="segment 1 is not finite") as caught:
        run(bench)
    changed = {name for name, parameter in bench.names().items() if not torch.equal(parameter, before[name])}
    assert (not changed) == (states == "disk")
    assert not caught.value.values_intact
    assert all(name.startswith(("layer 0", "layer 1", "head 0")) for name in changed)
    assert {group.steps for group in bench.executor.optimizer.groups.values()} == ({0} if states == "disk" else {0, 1})


def test_an_overflow_before_the_first_early_update_is_run_again(four_bit, tmp_path):
    updated = []
    for scale in (1.0, 2.0**130):
        bench = bench_with(four_bit(), tmp_path, {"apply": "segment"})
        bench.executor.loss_scale, bench.executor.losses.local_weight = (
            scale,
            1e12,
        )  # the first segment's gradients bear least
        run(bench)
        updated.append(values(bench))
        assert bench.executor.loss_scale < 2.0**128
    for name, value in updated[0].items():
        assert torch.equal(value, updated[1][name]), name


def test_memory_errors_come_with_advice(four_bit):
    bench = make_bench(four_bit())

    def starve(grad: torch.Tensor) -> None:
        raise MemoryError("no room")

    bench.model.layers[2].self_attn.o_proj.lora_a.register_hook(starve)
    with pytest.raises(RunError, match=r"(?s)no room.*--max-seq-len"):
        run(bench)


def test_the_step_keeps_what_the_plan_says_and_no_more(four_bit):
    """Live saved inputs and graphs after each op, replayed from the plan: nothing outlives its backward."""
    bench = make_bench(four_bit(), num_segments=2)
    kept: dict[tuple[int, int], Keep] = {}
    for kind, method in list(bench.executor.methods.items()):

        def observed(state, op: Op, *, kind=kind, method=method) -> None:
            method(state, op)
            if kind is Kind.FORWARD and op.keep is not Keep.NONE:
                kept[op.micro_batch, op.target] = op.keep
            if kind is Kind.BACKWARD:
                del kept[op.micro_batch, op.target]
            assert set(state.inputs) == {key for key, keep in kept.items() if keep is Keep.INPUT}
            assert set(state.graphs) == {key for key, keep in kept.items() if keep is Keep.GRAPH}
            if kind is Kind.LOSS:
                assert state.target_BTD is None, "the segment's input is not needed after its loss"

        bench.executor.methods[kind] = observed
    run(bench)
    assert not kept


def test_the_first_layer_of_a_segment_computes_no_gradient_for_its_input(four_bit):
    bench = make_bench(four_bit(), num_segments=2)
    grads: dict[str, bool] = {}
    backward = bench.executor.methods[Kind.BACKWARD]

    def observed(state, op: Op) -> None:
        backward(state, op)
        grads[op.text()] = state.grad_BTD is not None

    bench.executor.methods[Kind.BACKWARD] = observed
    run(bench)
    assert grads == {"BACKWARD 1 mb=0": True, "BACKWARD 0 mb=0": False, "BACKWARD 3 mb=0": True, "BACKWARD 2 mb=0": False}


def test_evaluation_changes_nothing_and_keeps_no_graph(four_bit):
    bench = make_bench(four_bit(), dropout=0.5)
    before = values(bench)
    first = bench.evaluate([BATCH, random_batch((5,), seed=4)])
    assert first == bench.evaluate([BATCH, random_batch((5,), seed=4)]), "no dropout in evaluation"
    assert_untouched(bench, before)
    assert bench.evaluate([]) == 0.0


def test_observers_look_together_and_the_profiler_shows_the_ops_by_their_text(four_bit):
    bench, seen = make_bench(four_bit()), ([], [])
    first, second = (
        bench.executor.observed(lambda op, after, found=found: found.append((op.text(), after))) for found in seen
    )
    with first, second, profile() as profiler:
        bench.executor.run(bench.plan, [BATCH], step=1, learning_rates=RATES)
    assert seen[0] == seen[1] and len(seen[0]) == 2 * len(bench.plan.ops)
    assert not bench.executor.observers
    shown = {event.key for event in profiler.key_averages()}
    assert {op.text() for op in bench.plan.ops} <= shown
