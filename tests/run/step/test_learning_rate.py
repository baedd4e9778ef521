"""The learning-rate schedule's values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.run.step.optim import learning_rate


def rates(n_steps: int, schedule: str, ratio: float) -> list[float]:
    return [
        learning_rate(step, n_steps=n_steps, peak=2.0, schedule=schedule, warmup_ratio=ratio)
        for step in range(1, n_steps + 1)
    ]


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


def test_cycles_begin_at_the_peak_and_nothing_falls_below_the_lowest():
    def values(**how) -> list[float]:
        return [learning_rate(n, n_steps=8, peak=2.0, warmup_ratio=0.0, **how) for n in range(1, 9)]

    found = values(schedule="cosine", cycles=2, lowest=0.5)
    assert found[:4] == pytest.approx(found[4:]) and found[0] == found[4] == 2.0
    assert found[1:4] == pytest.approx([0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3)])
    assert values(schedule="linear", lowest=1.0) == pytest.approx([2 - i / 8 for i in range(8)])
    assert values(schedule="cosine") == values(schedule="cosine", cycles=1, lowest=0.0)


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
