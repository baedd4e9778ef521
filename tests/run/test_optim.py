"""The learning-rate schedule's values, AdamW per segment, and that a bad gradient leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.errors import RunError
from lopt_edge.run.optim import SegmentOptimizer, learning_rate

RATES = {0: 1e-2, 1: 1e-3}


def rates(n_steps: int, schedule: str, ratio: float) -> list[float]:
    return [learning_rate(step, n_steps=n_steps, peak=2.0, schedule=schedule, warmup_ratio=ratio)
            for step in range(1, n_steps + 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "ratio", "expected"),
    [
        ("constant", 0.0, [2.0] * 5),
        ("constant", 0.5, [2 / 3, 4 / 3, 2.0, 2.0, 2.0]),  # warm-up over ceil(2.5) steps, the last of them at the peak
        ("linear", 0.0, [2.0, 1.6, 1.2, 0.8, 0.4]),
        ("linear", 0.2, [2.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", 0.0, [1 + math.cos(math.pi * i / 5) for i in range(5)]),
        ("cosine", 0.4, [1.0, 2.0, 2.0, 1.5, 0.5]),
    ],
)
def test_values(schedule, ratio, expected):
    assert rates(5, schedule, ratio) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.99])
def test_a_single_step_runs_at_the_peak(schedule, ratio):
    assert rates(1, schedule, ratio) == [2.0]


@given(st.integers(1, 300), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 0.99))
def test_every_step_learns_and_none_exceeds_the_peak(n_steps, schedule, ratio):
    values = rates(n_steps, schedule, ratio)
    assert all(0 < value <= 2.0 for value in values)
    assert max(values) == 2.0
    n_warmup = math.ceil(ratio * n_steps)
    assert values[:n_warmup] == sorted(values[:n_warmup])
    assert values[n_warmup:] == sorted(values[n_warmup:], reverse=True)


def make_optimizer(**settings: object) -> tuple[SegmentOptimizer, dict[int, list[torch.nn.Parameter]]]:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        segment: [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
        for segment in (0, 1)
    }
    return SegmentOptimizer(parameters, **settings), parameters


def set_gradients(parameters: dict[int, list[torch.nn.Parameter]], *, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in parameters.values():
        for parameter in group:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def update(optimizer: SegmentOptimizer) -> None:
    optimizer.measure()
    for segment, rate in RATES.items():
        optimizer.step(segment, lr=rate)


@pytest.mark.parametrize("clip_scope", ["segment", "global"])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1000.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_three_steps_equal_torch(clip_scope, clip, weight_decay):
    ours, parameters = make_optimizer(clip=clip, clip_scope=clip_scope, weight_decay=weight_decay)
    _, reference = make_optimizer()
    groups = [{"params": reference[segment], "lr": rate} for segment, rate in RATES.items()]
    adamw = torch.optim.AdamW(groups, weight_decay=weight_decay)
    for seed in range(3):
        set_gradients(parameters, seed=seed, scale=1 + seed)
        update(ours)
        set_gradients(reference, seed=seed, scale=1 + seed)
        members = [reference[0] + reference[1]] if clip_scope == "global" else list(reference.values())
        for group in members:
            if clip:
                torch.nn.utils.clip_grad_norm_(group, clip)
        adamw.step()
    for segment in RATES:
        for mine, theirs in zip(parameters[segment], reference[segment], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
            assert mine.grad is None, "gradients are freed by the step"


def test_norms_are_those_of_the_unclipped_gradients():
    optimizer, parameters = make_optimizer(clip=0.1)
    set_gradients(parameters, seed=1, scale=3.0)
    expected = {
        segment: math.sqrt(sum(p.grad.square().sum().item() for p in group)) for segment, group in parameters.items()
    }
    update(optimizer)
    assert optimizer.norms == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("segment", [0, 1])
def test_one_bad_gradient_leaves_every_parameter_untouched(bad, segment):
    optimizer, parameters = make_optimizer(weight_decay=0.1)
    set_gradients(parameters, seed=0)
    update(optimizer)  # so that there are moments
    before = [p.detach().clone() for group in parameters.values() for p in group]
    moments = [
        value.clone() for adamw in optimizer.adamw.values() for state in adamw.state.values() for value in state.values()
    ]
    set_gradients(parameters, seed=1)
    parameters[segment][1].grad[2] = bad
    with pytest.raises(RunError, match=f"segment {segment} is not finite"):
        update(optimizer)
    optimizer.drop_gradients()
    after = [p for group in parameters.values() for p in group]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    again = [value for adamw in optimizer.adamw.values() for state in adamw.state.values() for value in state.values()]
    assert all(torch.equal(old, new) for old, new in zip(moments, again, strict=True))


def test_a_parameter_without_gradient_stays_as_it_is():
    optimizer, parameters = make_optimizer(weight_decay=0.5)
    set_gradients(parameters, seed=0)
    parameters[0][0].grad = None
    before = parameters[0][0].detach().clone()
    update(optimizer)
    assert torch.equal(parameters[0][0], before)
