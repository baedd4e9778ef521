"""MLAAN's laws: its gradients are those of its definition, averages follow their formula, and no memory knob changes a bit.

The reference is written from the formulas of plan/methods/mlaan.py: for each segment but the first both of its losses, the
independent one and the cascaded one, each in a graph of its own through a tail of frozen copies; the adapters' averages are
put in by hand. Where both have weight 1 - w and w, sums are taken in another order than in the one pass that serves both:
rtol 1e-5 of a gradient's largest value. Against a reference that crosses a boundary as the plan does it is bitwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lopt_edge import finetune
from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.methods.mlaan import leaps
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Keep, Op, Plan, parse_plan
from lopt_edge.plan.schedule.passes import arrange
from lopt_edge.plan.schedule.validate import PlanError, validate
from lopt_edge.plan.search.bounds import Bounds
from lopt_edge.run.model.lora import ADAPTER_NAME, layer_parameters
from lopt_edge.run.step.batches import Batch, window_totals
from lopt_edge.run.step.losses import task_loss
from lopt_edge.run.step.step_state import Cut
from tests.laws.bench import Bench, make_bench, random_batch
from tests.laws.test_timeline import check
from tests.plan.plans import cases, make_course, make_knobs
from tests.plan.workloads import make_workload
from tools.timeline_settings import Setting
from tools.tiny_runs import make_config, make_model

BATCHES = [random_batch((11, 7), seed=1), random_batch((9, 9), seed=2)]
DEPTH, WEIGHT = 6, 0.75
PAGED = {"weights": "disk", "activations": "page", "saved_inputs": "disk", "states": "disk", "gradients": "disk"}


@pytest.fixture(scope="module")
def folder(four_bit):
    return four_bit("llama", num_hidden_layers=DEPTH)


def bench_of(folder: Path, **options: Any) -> Bench:
    """With averages that differ from the adapters, so that the wrong set would show."""
    bench = make_bench(folder, method="mlaan", **{"num_segments": 3, "cascade_weight": WEIGHT, **options})
    generator = torch.Generator().manual_seed(11)
    for flat in bench.executor.averages.flat.values():
        flat.add_(torch.empty(flat.shape).normal_(0, 0.05, generator=generator))
    return bench


class Scaled(torch.autograd.Function):
    """Identity; the gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


class Reference:
    """The definition on one batch: boundaries, segments, tails with averages."""

    def __init__(self, bench: Bench, batch: Batch) -> None:
        self.bench, self.batch, self.model = bench, batch, bench.model
        self.hidden = self.model.embed(batch.ids_BT)
        self.frame = self.model.layer_context(self.hidden)
        self.entering = []
        with torch.no_grad():
            for segment in bench.plan.segments:
                self.entering.append(self.hidden)
                self.hidden = self.through(segment.index, self.hidden)

    def through(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.bench.plan.segments[index].layers:
            hidden = self.model.run_layer(layer, hidden, self.frame)
        return hidden

    def loss(self, index: int, leaving: torch.Tensor) -> torch.Tensor:
        """Read out behind segment `index`, through its tail: frozen layers whose adapters are the averages."""
        for layer in self.bench.plan.segments[index].tail:
            parameters, flat = layer_parameters(self.model, layer), self.bench.executor.averages.flat[layer]
            kept = [(p, p.data, p.requires_grad) for p in parameters]
            position = 0
            for p in parameters:  # never the same layer as in the window: its graph is not touched
                p.data, position = flat[position : position + p.numel()].view(p.shape), position + p.numel()
            leaving = self.model.run_layer(layer, leaving, self.frame)
            self.kept = [*getattr(self, "kept", []), *kept]
        selected = leaving.flatten(0, 1)[self.batch.supervised_N]
        return task_loss(self.model, selected, self.batch.targets_N) * (1.0 / window_totals([self.batch]).supervised)

    def backward(self, loss: torch.Tensor) -> None:
        """And the adapters as they were; what a tail's layers got is thrown away."""
        before = {p: None if p.grad is None else p.grad.clone() for p, *_ in getattr(self, "kept", [])}
        loss.backward()
        for p, data, _ in getattr(self, "kept", []):
            p.data, p.grad = data, before[p]
        self.kept = []


def by_two_losses(bench: Bench, batch: Batch) -> None:
    """(1 - w) independent + w cascaded, in graphs of their own."""
    reference = Reference(bench, batch)
    for index in range(1, len(bench.plan.segments)):
        independent = reference.loss(index, reference.through(index, reference.entering[index].detach()))
        reference.backward(independent * (1 - WEIGHT))
        crossed = reference.through(index - 1, reference.entering[index - 1].detach())
        reference.backward(reference.loss(index, reference.through(index, crossed)) * WEIGHT)


def by_one_pass(bench: Bench, batch: Batch) -> None:
    """One loss a window, whose gradient is multiplied by w where it crosses."""
    reference = Reference(bench, batch)
    for index in range(1, len(bench.plan.segments)):
        crossed = reference.through(index - 1, reference.entering[index - 1].detach())
        reference.backward(reference.loss(index, reference.through(index, Scaled.apply(crossed, WEIGHT))))


SHAPES = [{"num_segments": 3}, {"num_segments": 4, "leap_layers": 1}, {"num_segments": DEPTH, "leap_layers": 9}]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_definition(folder, shape):
    bench = bench_of(folder, **shape)
    for batch in BATCHES:
        ours = bench.gradients([batch])
        assert len(ours) == 2 * 7 * DEPTH
        by_one_pass(bench, batch)
        for name, gradient in bench.take_gradients().items():
            assert gradient.abs().max() > 0, f"{name} is zero: the test would prove nothing"
            assert torch.equal(ours[name], gradient), name
        by_two_losses(bench, batch)
        for name, gradient in bench.take_gradients().items():
            assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert all(p.grad is None for flat in bench.executor.averages._matrices.values() for p in flat)


def test_a_whole_window_is_not_needed_for_the_last_segment(folder):
    """Its gradient is e2e's, whatever the others do: the last window's loss is the task's."""
    wanted = make_bench(folder, method="e2e").gradients([BATCHES[0]])
    found = make_bench(folder, method="mlaan", num_segments=3).gradients([BATCHES[0]])
    last = [name for name in found if name.startswith(("layer 4", "layer 5"))]
    assert last and all(torch.equal(found[name], wanted[name]) for name in last)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_memory_knob_changes_a_bit(folder, tmp_path, dropout):
    plain = bench_of(folder, n_micro_batches=2, dropout=dropout).gradients(BATCHES)
    for changes in (PAGED, {"activations": "keep"}, {"saved_inputs": "disk", "gradients": "disk", "prefetch": 2}):
        bench = bench_of(folder, n_micro_batches=2, knobs=make_knobs(DEPTH, **changes), page_dir=tmp_path, dropout=dropout)
        found = bench.gradients(BATCHES) if changes.get("gradients") != "disk" else after_backward(bench)
        bench.executor.mover.close()
        assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain), changes


def after_backward(bench: Bench) -> dict[str, torch.Tensor]:
    """Each group's gradients where its STEP finds them, before clipping."""
    found: dict[str, torch.Tensor] = {}

    def observe(op: Op, after: bool) -> None:
        if op.kind is Kind.STEP and not after:
            group = bench.executor.optimizer.groups[op.group]
            found.update({f"layer {op.target} {i}": p.grad.clone() for i, p in enumerate(group.parameters)})

    with bench.executor.observed(observe):
        bench.executor.run(bench.plan, BATCHES, step=1, learning_rates=dict.fromkeys(range(3), 0.0))
    return found


def test_averages_follow_their_formula_and_nothing_else_moves_them(folder):
    bench = make_bench(folder, method="mlaan", num_segments=3, ema_momentum=0.9)
    averages, groups = bench.executor.averages, bench.executor.optimizer.groups
    assert sorted(averages.flat) == [4, 5]
    wanted = {layer: groups["layer", layer].values.detach().clone() for layer in averages.flat}
    for step in (1, 2, 3):
        bench.executor.run(bench.plan, [BATCHES[0]], step=step, learning_rates=dict.fromkeys(range(3), 1e-2))
        for layer, average in averages.flat.items():
            wanted[layer] = 0.9 * wanted[layer] + (1 - 0.9) * groups["layer", layer].values.detach()
            torch.testing.assert_close(average, wanted[layer], rtol=1e-6, atol=1e-8)
            assert not torch.equal(average, groups["layer", layer].values)
    before = {layer: average.clone() for layer, average in averages.flat.items()}
    bench.gradients([BATCHES[1]])
    assert all(torch.equal(before[layer], average) for layer, average in averages.flat.items())


def test_a_step_is_cut_between_micro_batches_only(folder):
    bench, cuts = make_bench(folder, method="mlaan", num_segments=4, n_micro_batches=2), []

    def between(cut: Cut) -> None:
        cuts.append(cut.micro_batch)

    bench.executor.run(bench.plan, BATCHES, step=1, learning_rates=dict.fromkeys(range(4), 1e-3), between=between)
    assert cuts == [1]


# the plan --------------------------------------------------------------------------------------------------------------


def plan_of(n_layers: int = 8, *, n_micro_batches: int = 1, knobs: dict[str, Any] | None = None, **options: Any) -> Plan:
    course = make_course("mlaan", n_layers=n_layers, **{"leap_layers": 2, **options})
    plan = step_plan("mlaan", course.kinds[0], n_micro_batches=n_micro_batches)
    return arrange(plan, make_knobs(n_layers, **(knobs or {})))


def test_windows_of_two_segments_and_their_tails():
    segments = plan_of().segments
    assert [segment.text() for segment in segments] == [
        "segment 0 layers=0-1 loss=following",
        "segment 1 layers=2-3 loss=next-token reach=0 tail=5,7",
        "segment 2 layers=4-5 loss=next-token reach=2 tail=6-7",
        "segment 3 layers=6-7 loss=task reach=4",
    ]
    assert [leaps(4, 11, n) for n in (1, 2, 3, 99)] == [(11,), (7, 11), (5, 8, 11), tuple(range(4, 12))]
    assert plan_of(leap_layers=9).segments[1].tail == (4, 5, 6, 7)


@pytest.mark.parametrize("n_micro_batches", [1, 3])
@pytest.mark.parametrize("knobs", [{}, PAGED, {"saved_inputs": "disk", "prefetch": 0}, {"activations": "keep"}])
def test_the_text_round_trips_and_the_rules_hold(n_micro_batches, knobs):
    for options in ({}, {"num_segments": 3, "leap_layers": 1}, {"boundary_layers": (1, 4)}, {"num_segments": 8}):
        plan = plan_of(n_micro_batches=n_micro_batches, knobs=knobs, **options)
        for clip_scope in ("global", "segment", "none"):
            validate(plan, clip_scope=clip_scope)
        assert parse_plan(plan.text()) == plan


def test_every_layer_of_a_window_runs_once_in_it_and_nothing_before():
    plan = plan_of()
    for segment in plan.segments[1:]:
        ops = [op for op in plan.ops if op.pass_index == segment.index and op.kind is Kind.FORWARD]
        assert tuple(op.target for op in ops) == segment.window
        assert [op.keep for op in ops] == [Keep.INPUT] * (len(ops) - 1) + [Keep.GRAPH]
        assert {op.target for op in ops if op.adapters == "ema"} == set(segment.tail)
    assert [op.text() for op in plan.ops if op.kind in (Kind.EMBED, Kind.HOLD, Kind.READ)] == [
        "EMBED mb=0 pass=1",
        "HOLD 2 mb=0 pass=1",
        "READ held 2 mb=0 pass=2",
        "HOLD 4 mb=0 pass=2",
        "READ held 4 mb=0 pass=3",
    ]


BROKEN = {
    "(8)": lambda op: op._replace(adapters="train") if op.kind is Kind.BACKWARD and op.adapters == "ema" else op,
    "(2): nothing was held": lambda op: None if op.kind is Kind.HOLD else op,
    "(7): the gradients of segment 3": lambda op: None if op.pass_index == 3 else op,
    "an average of a tail's layer is never": lambda op: None if op.kind is Kind.AVERAGE else op,
    "(4)": lambda op: None if op.kind is Kind.LOSS else op,
    "(8): not every group": lambda op: None if op.kind is Kind.STEP and op.target == 0 else op,
}


@pytest.mark.parametrize("rule", BROKEN)
def test_the_validator_sees_what_is_broken(rule):
    plan = plan_of()
    changed = tuple(new for op in plan.ops if (new := BROKEN[rule](op)) is not None)
    with pytest.raises(PlanError) as caught:
        validate(replace(plan, ops=changed))
    assert rule in str(caught.value)


def test_a_step_before_its_second_window_is_seen():
    plan = plan_of()
    at = next(i for i, op in enumerate(plan.ops) if op.kind is Kind.READ)  # after the first window
    step = next(op for op in plan.ops if op.kind is Kind.STEP and op.target == 2)
    rest = [op for op in plan.ops if op is not step]
    with pytest.raises(PlanError, match=r"\(7\)"):
        validate(replace(plan, ops=(*rest[:at], step, *rest[at:])))


def test_an_average_before_a_step_is_seen():
    plan = plan_of()
    *others, first, second = plan.ops
    steps = [i for i, op in enumerate(others) if op.kind is Kind.STEP]
    with pytest.raises(PlanError, match=r"\(8\)"):
        validate(replace(plan, ops=(*others[: steps[-1]], first, others[steps[-1]], second)))


# bytes and seconds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("changes", [{}, PAGED, {"activations": "keep", "gradients": "disk"}])
def test_predicted_bytes_are_the_tracked_ones(tmp_path, changes, dropout):
    """Law 6 as for all methods, averages among the adapters."""
    lengths = ((60, 50), (40, 30))
    check(Setting("llama", torch.float32, lengths, make_knobs(DEPTH, **changes), "mlaan", 3, dropout=dropout), tmp_path)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(3, 8), st.integers(1, 4), st.sampled_from(["cpu", "rtx4090"]))
def test_any_knobs_give_a_plan_that_obeys_the_rules_and_the_searchs_bounds(case, num_segments, n_leaps, machine):
    knobs, n_layers = replace(case.knobs, apply="step"), len(case.knobs.weights)
    assume(n_layers >= num_segments)
    course = make_course("mlaan", n_layers=n_layers, num_segments=num_segments, leap_layers=n_leaps)
    plan = arrange(step_plan("mlaan", course.kinds[0], n_micro_batches=case.n_micro_batches), knobs)
    assert parse_plan(validate(plan, clip_scope=case.clip_scope).text()) == plan
    made = make_workload("e2e", machine, n_layers=n_layers, n_tokens=(700,) * case.n_micro_batches)
    workload = replace(made, course=course)
    bounds = Bounds(workload)
    assert bounds.seconds(knobs) <= workload.seconds(knobs).seconds * (1 + 1e-9)
    found = workload.predict(knobs)
    assert bounds.device_bytes(knobs) <= found.device_bytes
    assert bounds.host_bytes(knobs) <= found.host_bytes and bounds.disk_bytes(knobs) <= found.disk_bytes


# whole runs ------------------------------------------------------------------------------------------------------------

FAST = {"method": "mlaan", "num_segments": 3, "max_steps": 4, "n_rows": 15, "ema_momentum": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=4)


def test_the_adapter_loads_in_peft(model, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = make_config(model, tmp_path, output="adapter", **{**FAST, "max_steps": 1})
    finetune(config)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), config.output)
    wanted = load_file(Path(config.output) / ADAPTER_NAME)
    found = {name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "e2e", "leap_layers": 3}, "belongs to method mlaan"),
        ({"method": "lopt", "ema_momentum": 0.5}, "belongs to method mlaan"),
        ({"method": "frozen", "cascade_weight": 0.5}, "belongs to method mlaan"),
        ({"method": "mlaan", "ema_momentum": 1.0}, "less than 1"),
        ({"method": "mlaan", "leap_layers": 0}, "greater than or equal to 1"),
        ({"method": "mlaan", "cascade_weight": 0}, "greater than 0"),
        ({"method": "mlaan", "apply": "segment"}, "mlaan needs step"),
        ({"method": "mlaan", "boundary_cache": "b"}, "early segments that never train"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises((InputError, InputErrors), match=says) as caught:
        load_config(None, {"model": "m", "data": "d", "output": "o", **options})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [({"num_segments": 2}, "3 segments or more"), ({"boundary_layers": (2,)}, "3 segments or more"),
     ({"num_segments": 9}, "the model has 8 layers")],
)  # fmt: skip
def test_a_cut_that_leaves_no_window_is_refused(options, says):
    with pytest.raises(InputError, match=says) as caught:
        make_course("mlaan", n_layers=8, **options)
    assert caught.value.exit_code == 2


def test_four_segments_unless_said_otherwise():
    assert Config(model="m", data="d", output="o", method="mlaan").num_segments == 4
    assert Config(model="m", data="d", output="o", method="mlaan", num_segments=3).num_segments == 3
    assert Config(model="m", data="d", output="o", method="lopt").num_segments == 2
