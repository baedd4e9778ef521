"""Each method's law: its gradients equal those of a direct construction of its definition in one autograd graph, bitwise.

The reference knows segments and losses only: it runs the layers in order, detaches at each boundary, hands the gradient on
unchanged where a layer is passed through, sums the losses and calls backward once. What an option changes in the course of
a run (which kind each step is, which groups rest) is shown on the plans and on whole steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lopt_edge.errors import InputError
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.planning.worst_case import plan_run
from lopt_edge.run.step.batches import Batch, Totals, window_totals
from lopt_edge.run.step.diagnosis import first_not_finite
from lopt_edge.run.step.losses import task_loss
from lopt_edge.run.step.segment_loss import SegmentLosses, SegmentOutput
from lopt_edge.run.tiers.feature_cache import FeatureCache
from tests.laws.bench import LOCAL_WEIGHT, Bench, make_bench, random_batch
from tests.plan.plans import make_course

BATCHES = [random_batch((11, 7), seed=1), random_batch((9, 9), seed=2)]
DEPTH, ALIGN_WEIGHT = 6, 0.3


def rounded(hidden: torch.Tensor) -> torch.Tensor:
    """As a cache gives it back."""
    return hidden.to(torch.bfloat16).to(hidden.dtype)


class _PassThrough(torch.autograd.Function):
    """The layer's output; the gradient goes to its input as it is."""

    @staticmethod
    def forward(ctx: Any, entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
        return leaving.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def reference_loss(bench: Bench, batch: Batch, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """`teacher`: features (B, T, D) that an alignment aims at."""
    model, segments, totals = bench.model, bench.plan.segments, window_totals([batch])
    n_local = sum(segment.is_local for segment in segments)
    model.clock.micro_batch = 0
    hidden, total = model.embed(batch.ids_BT), torch.zeros(())
    frame = model.layer_context(hidden)
    for segment in segments:
        entered = hidden = hidden.detach()
        for layer in segment.layers:
            if layer in segment.trained:
                hidden = model.run_layer(layer, hidden, frame)
                if any(op.kind is Kind.ALIGN and op.target == layer for op in bench.plan.ops):
                    total = total + ALIGN_WEIGHT * minus_cosine(hidden, teacher, batch) * (1.0 / totals.tokens)
            else:
                with torch.no_grad():
                    leaving = model.run_layer(layer, hidden, frame)
                hidden = _PassThrough.apply(hidden, leaving) if segment.trains else leaving
        if not segment.trains:
            continue
        flat = hidden.flatten(0, 1)
        if segment.has_head:
            rows = torch.arange(len(flat)) if batch.real_N is None else batch.real_N
            loss = bench.heads[segment.index](flat[rows], entered.flatten(0, 1)[rows])
            loss = loss * (1.0 / (totals.tokens * flat.shape[1]))
        elif segment.loss == "align":
            loss = minus_cosine(hidden, teacher, batch) * (1.0 / totals.tokens)
        else:
            loss = task_loss(model, flat[batch.supervised_N], batch.targets_N) * (1.0 / totals.supervised)
        total = total + (loss * (LOCAL_WEIGHT / n_local) if segment.is_local else loss)
    return total


def minus_cosine(hidden: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
    rows = torch.arange(hidden[..., 0].numel()) if batch.real_N is None else batch.real_N
    return -torch.cosine_similarity(hidden.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows], dim=1).sum()


CASES = {
    "lopt, next-token": ("lopt", {"num_segments": 3, "local_loss": "next-token"}),
    "lopt, some steps": ("lopt", {"local_every": 2}),
    "lopt, opened": ("lopt", {"open_every": 3}),
    "lopt, opened and some": ("lopt", {"open_every": 4, "local_every": 2}),
    "lopt, never but opened": ("lopt", {"open_every": 2, "local_every": 0}),
    "lopt, never": ("lopt", {"local_every": 0}),
    "lopt, open at first": ("lopt", {"open_until": 0.5}),
    "lopt, open at first, then local": ("lopt", {"open_until": 0.5, "local_every": 2}),
    "lopt, a schedule of reach": ("lopt", {"reach": "0.2:5,0.4:5..2,0.8:2,1:1/2"}),
    "top-layers": ("top-layers", {"train_layers": 2}),
    "top-layers, all": ("top-layers", {"train_layers": DEPTH}),
    "lcsb": ("lcsb", {}),
    "lcsb, a third, resting": ("lcsb", {"select_ratio": 0.34, "unselected": "rest"}),
    "lcsb, uniform": ("lcsb", {"selection": "uniform"}),
    "lcsb, all": ("lcsb", {"select_ratio": 1.0}),
    "segprop": ("segprop", {"stages": 2, "tail_layers": 2}),
    "segprop, single layers": ("segprop", {"stages": 5, "tail_layers": 1}),
}


@pytest.fixture(scope="module")
def folder(four_bit):
    return four_bit("llama", num_hidden_layers=DEPTH)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_step_equals_one_graph_bitwise(folder, name):
    method, options = CASES[name]
    bench = make_bench(folder, method=method, **options)
    for kind in bench.plans:
        here = bench.of_kind(kind)
        for batch in BATCHES:
            ours = here.gradients([batch])
            reference_loss(here, batch).backward()
            theirs = here.take_gradients()
            assert ours.keys() == theirs.keys() and ours
            for parameter, gradient in ours.items():
                assert gradient.abs().max() > 0, f"{parameter} is zero: the test would prove nothing"
                assert torch.equal(gradient, theirs[parameter]), (kind, parameter)


def test_a_whole_selection_is_end_to_end(folder):
    """LCSB with all layers and an open step: e2e's gradients, bitwise."""
    wanted = make_bench(folder, method="e2e").gradients([BATCHES[0]])
    all_selected = make_bench(folder, method="lcsb", select_ratio=1.0).gradients([BATCHES[0]])
    opened = make_bench(folder, method="lopt", open_every=2).of_kind("open").gradients([BATCHES[0]])
    for found in (all_selected, opened):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_closed_keeps_its_values_and_lets_its_moments_go(folder):
    """The last half goes on as if nothing had been let go: bitwise as with the states of all layers kept."""
    found = []
    for closes in (True, False):
        bench = make_bench(folder, open_until=0.5)
        groups = bench.executor.optimizer.groups
        for step, kind in enumerate(("open", "closed", "closed"), start=1):
            plan = replace(bench.plans[kind], closed=DEPTH // 2 if closes and kind == "closed" else 0)
            bench.executor.run(plan, [BATCHES[0]], step=step, learning_rates={0: 1e-2, 1: 1e-2})
            if step == 1:
                opened = {name: group.values.clone() for name, group in groups.items()}
        for (_, layer), group in groups.items():
            early = layer < DEPTH // 2
            assert torch.equal(group.values, opened["layer", layer]) == early
            assert (group.moments is None) == (early and closes)
        found.append({name: group.values.clone() for name, group in groups.items()})
        held = dict(bench.executor.optimizer.tensors())["gradients"].numel()
        assert held == sum(group.n_elements for group in groups.values()) // (2 if closes else 1)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_aux_head_learns_at_its_own_rate(folder):
    bench = make_bench(folder)
    before = {name: parameter.detach().clone() for name, parameter in bench.names().items()}
    rates = {0: 0.0, 1: 0.0, ("aux", 0): 1e-2}
    bench.executor.run(bench.plan, [BATCHES[0]], step=1, learning_rates=rates)
    moved = {name for name, parameter in bench.names().items() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.startswith("head ")}


@pytest.mark.parametrize("num_segments", [2, 3])
def test_a_fresh_boundary_is_that_of_the_updated_segment(folder, num_segments):
    """When a segment is updated, those before it have been: its gradients are those of one graph with their new values."""
    bench = make_bench(folder, num_segments=num_segments, boundary_update="fresh", n_micro_batches=1)
    names = bench.names()
    seen: dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}

    def observe(op, after):
        if op.kind is Kind.STEP and not after:
            segment = op.target if op.unit == "aux" else bench.plan.segment_of(op.target).index
            values = {name: p.detach().clone() for name, p in names.items()}
            gradients = {name: p.grad.clone() for name, p in names.items() if p.grad is not None}
            seen.setdefault(segment, (values, gradients))

    rates = dict.fromkeys(range(num_segments), 1e-2)
    with bench.executor.observed(observe):
        bench.executor.run(bench.plan, [BATCHES[0]], step=1, learning_rates=rates)
    assert sorted(seen) == list(range(num_segments))
    for segment, (values, ours) in seen.items():
        for name, parameter in names.items():
            parameter.data.copy_(values[name])
        reference_loss(bench, BATCHES[0]).backward()
        theirs = bench.take_gradients()
        assert ours
        for name, gradient in ours.items():
            assert torch.equal(gradient, theirs[name]), (segment, name)
    changed = [name for name in names if not torch.equal(seen[0][0][name], seen[num_segments - 1][0][name])]
    assert changed, "the early segments were updated before the last one's gradients"


@pytest.mark.parametrize("unselected", ["move", "rest"])
def test_unselected_layers_move_by_momentum_or_rest(folder, unselected):
    bench = make_bench(folder, method="lcsb", unselected=unselected)
    for step, kind in enumerate(bench.plans, start=1):  # one step of each: all have moments
        bench.executor.run(bench.plans[kind], [BATCHES[0]], step=step, learning_rates={0: 1e-2})
    other = bench.of_kind("group-1").names()
    before = {name: p.detach().clone() for name, p in other.items()}
    updates = {group: state.steps for group, state in bench.executor.optimizer.groups.items()}
    bench.executor.run(bench.plans["group-0"], [BATCHES[0]], step=3, learning_rates={0: 1e-2})
    moved = [not torch.equal(before[name], p.detach()) for name, p in other.items()]
    assert all(moved) if unselected == "move" else not any(moved)
    for (unit, layer), state in bench.executor.optimizer.groups.items():
        is_updated = layer % 2 == 0 or unselected == "move"
        assert state.steps == updates[unit, layer] + is_updated


def test_a_moving_layer_is_updated_as_torch_does_with_a_zero_gradient(folder):
    bench = make_bench(folder, method="lcsb", clip=0.0)
    group = bench.executor.optimizer.groups["layer", 1]
    bench.executor.run(bench.plans["group-1"], [BATCHES[0]], step=1, learning_rates={0: 1e-2})
    twin = torch.nn.Parameter(group.values.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.0)
    first, second = bench.executor.optimizer.moments_copy(("layer", 1)).clone().view(2, -1)
    adamw.state[twin] = {"step": torch.tensor(1.0), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
    twin.grad = torch.zeros_like(twin)
    adamw.step()
    bench.executor.run(bench.plans["group-0"], [BATCHES[0]], step=2, learning_rates={0: 1e-2})
    torch.testing.assert_close(group.values, twin.detach(), rtol=1e-6, atol=1e-9)


def test_which_step_is_of_which_kind():
    def kinds(method: str, n_steps: int = 8, **options: Any) -> str:
        course = make_course(method, n_layers=DEPTH, **options)
        return " ".join(course.kind(step, n_steps).name[:6] or "-" for step in range(1, n_steps + 1))

    assert kinds("lopt") == "- - - - - - - -"
    assert kinds("lopt", local_every=4) == "local rest rest rest local rest rest rest"
    assert kinds("lopt", open_every=3) == "open local local open local local open local"
    assert kinds("lopt", open_every=4, local_every=2) == "open local rest local open local rest local"
    assert kinds("lcsb", select_ratio=0.34, n_steps=4) == "group- group- group- group-"
    course = make_course("lcsb", n_layers=DEPTH, select_ratio=0.34)
    assert [course.kind(step, 9).segments[0].trained for step in (1, 2, 3, 4)] == [(0, 3), (1, 4), (2, 5), (0, 3)]


def test_the_stages_of_segprop():
    """Each trains its segment and the tail, runs the finished ones, and leaves the later ones out; all share the steps."""
    course = make_course("segprop", n_layers=6, stages=2, tail_layers=2)
    first, second = course.kinds
    assert [(s.layers, s.trained) for s in first.segments] == [((0, 1, 4, 5), (0, 1, 4, 5))]
    assert [(s.layers, s.trained) for s in second.segments] == [((0, 1), ()), ((2, 3, 4, 5), (2, 3, 4, 5))]
    assert [course.kind(step, 10) for step in range(1, 11)] == [first] * 5 + [second] * 5
    assert [course.phase(step, 10) for step in (1, 5, 6, 10)] == [(0, 1, 5), (0, 1, 5), (1, 6, 10), (1, 6, 10)]
    assert course.adapted == tuple(range(6))


def test_a_stage_that_ends_early_leaves_its_steps_to_the_later_ones():
    course = make_course("segprop", n_layers=6, stages=4, tail_layers=2)
    assert [course.phase(step, 16)[0] for step in range(1, 17)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert [course.phase(step, 16, ended=[2])[0] for step in range(1, 17)] == [0] * 2 + [1] * 5 + [2] * 5 + [3] * 4
    assert [course.phase(step, 16, ended=[2, 4])[0] for step in range(1, 17)] == [0] * 2 + [1] * 2 + [2] * 6 + [3] * 6
    assert course.phase(3, 16, ended=[2, 4]) == (1, 3, 4)


def test_a_uniform_draw_is_a_function_of_seed_and_step():
    def draws(seed: int) -> list[tuple[int, ...]]:
        course = make_course("lcsb", n_layers=DEPTH, selection="uniform", seed=seed)
        return [course.kind(step, 40).segments[0].trained for step in range(1, 41)]

    assert draws(0) == draws(0) != draws(1)
    assert all(len(drawn) == 3 for drawn in draws(0))
    assert {layer for drawn in draws(0) for layer in drawn} == set(range(DEPTH))


@pytest.mark.parametrize(
    ("method", "options"),
    [("frozen", {"num_segments": 3}), ("top-layers", {"train_layers": 2}), ("lopt", {"local_every": 0})],
)
def test_a_step_that_reads_the_boundary_equals_the_one_that_wrote_it(folder, tmp_path, method, options):
    """And both equal one graph whose boundary is rounded to bfloat16."""
    bench = make_bench(folder, method=method, boundary_cache="unused", **options)
    batch = replace(BATCHES[0], examples=(1, 0))
    width = bench.model.facts.hidden_size
    cache = FeatureCache(tmp_path, identity={}, lengths=(7, 11), width=width)
    bench.executor.caches = {"boundary": cache}
    filled = bench.of_kind("fill").gradients([batch])
    read = bench.of_kind("read").gradients([batch])
    assert cache.has([0, 1]) and filled.keys() == read.keys()
    last = bench.plan.segments[-1]
    hidden = bench.model.embed(batch.ids_BT)
    frame = bench.model.layer_context(hidden)
    with torch.no_grad():
        for layer in range(last.first):
            hidden = bench.model.run_layer(layer, hidden, frame)
    hidden = rounded(hidden)
    for layer in last.layers:
        hidden = bench.model.run_layer(layer, hidden, frame)
    loss = task_loss(bench.model, hidden.flatten(0, 1)[batch.supervised_N], batch.targets_N)
    (loss * (1.0 / len(batch.targets_N))).backward()
    theirs = bench.of_kind("read").take_gradients()
    for name, gradient in read.items():
        assert torch.equal(gradient, filled[name]) and torch.equal(gradient, theirs[name]), name
    kinds = [op.kind for op in bench.of_kind("read").plan.ops]
    assert Kind.EMBED not in kinds and kinds.count(Kind.FORWARD) == len(last.layers)


@pytest.mark.parametrize(("method", "options"), [
    ("let", {"align_layer": 1}), ("let", {"align_layer": DEPTH - 1}), ("let-local", {"num_segments": 3}),
    ("lopt", {"local_loss": "align"}),
])  # fmt: skip
@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_alignments_equal_one_graph(folder, tmp_path, method, options, activations):
    """Their own gradient is by hand, so equal up to rounding; whatever it does not reach is equal bitwise."""
    knobs = Knobs(("resident",) * DEPTH, (activations,) * DEPTH)
    bench = make_bench(folder, method=method, knobs=knobs, **options)
    batch, width = replace(BATCHES[0], examples=(0, 1)), bench.model.facts.hidden_size
    cache = FeatureCache(tmp_path, identity={}, lengths=(11, 7), width=width)
    features = torch.randn(2, 11, width, generator=torch.Generator().manual_seed(4))
    cache.write((0, 1), features)
    bench.executor.caches = {"teacher": cache}
    ours = bench.gradients([batch], align_weight=ALIGN_WEIGHT)
    total = reference_loss(bench, batch, rounded(features))
    total.backward()
    theirs = bench.take_gradients()
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-4, atol=1e-6)
    if method == "let":
        assert ALIGN_WEIGHT * bench.result.align_loss == pytest.approx(total.item() - bench.result.loss, abs=1e-5)
        # without the alignment the gradients are others, but not those of the layers above
        plain = make_bench(folder, method="e2e").gradients([batch])
        moved = {int(name.split()[1]) for name in ours if not torch.equal(ours[name], plain[name])}
        assert moved == set(range(options["align_layer"] + 1))
    else:
        segments = bench.plan.segments
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if int(name.split()[1]) >= segments[-1].first)


def test_the_plain_steps_of_let_have_no_teacher(folder):
    bench = make_bench(folder, method="let", align_until=0.5)
    assert list(bench.plans) == ["align", "plain"]
    gradients = bench.of_kind("plain").gradients([BATCHES[0]])
    wanted = make_bench(folder, method="e2e").gradients([BATCHES[0]])
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    local = make_bench(folder, method="let-local", align_until=0.5).of_kind("plain")
    assert {op.target for op in local.plan.ops if op.kind is Kind.STEP} == {3, 4, 5}


def test_a_step_that_is_finite_after_all_is_not_done_twice(folder):
    """Diagnosis looks at a step once more and leaves it before its updates."""
    bench = make_bench(folder)
    before = {name: parameter.detach().clone() for name, parameter in bench.names().items()}
    assert first_not_finite(bench.executor, bench.plan, [BATCHES[0]], step=1, learning_rates={0: 1.0, 1: 1.0}) == ""
    assert all(torch.equal(before[name], parameter.detach()) for name, parameter in bench.names().items())
    assert not any(group.steps for group in bench.executor.optimizer.groups.values())


def test_an_alignment_survives_float16():
    """Scaled before it is cast: at 1 / tokens alone two thirds of its gradient would be too small for float16."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (100 * torch.randn(1, 64, 512, generator=generator) for _ in range(2))
    batch = replace(random_batch((64,)), real_N=None)
    segment, totals = Segment(0, 0, 0, "align"), Totals(supervised=1, tokens=4096)
    losses = SegmentLosses(None, {}, local_weight=10.0)

    def gradient(dtype: torch.dtype, loss_scale: float) -> torch.Tensor:
        output = SegmentOutput(segment, 1, batch, totals, hidden.to(dtype), None, teacher.to(dtype), 1024)
        return losses.gradient(output, loss_scale=loss_scale).grad_BTD.double() / loss_scale

    exact, half = gradient(torch.float32, 1.0), gradient(torch.float16, 2.0**16)
    assert (half - exact).norm() < 2e-3 * exact.norm()
    output = SegmentOutput(segment, 1, batch, totals, hidden, None, hidden, 1024)
    value = SegmentLosses(None, {}, local_weight=1.0).gradient(output, loss_scale=4.0).loss
    assert value.item() == pytest.approx(-64 / 4096)


def test_a_share_that_cyclic_groups_cannot_have_is_refused():
    with pytest.raises(InputError, match=r"0\.7 is not near"):
        make_course("lcsb", n_layers=DEPTH, select_ratio=0.7)
    assert len(make_course("lcsb", n_layers=DEPTH, select_ratio=0.7, selection="uniform").kinds) == 2


def test_a_depth_on_which_lcsb_has_failed_is_said_before_the_run():
    for selection in ("cyclic", "uniform"):
        assert "failed on a deep model" in make_course("lcsb", n_layers=30, selection=selection).advice[0]
        assert not make_course("lcsb", n_layers=8, selection=selection).advice
        assert not make_course("lcsb", n_layers=30, selection=selection, select_ratio=1.0).advice
    plan = plan_run("qwen2.5-0.5b", method="lcsb", device_memory="4GB")
    assert any("failed on a deep model" in note for note in plan.notes)
