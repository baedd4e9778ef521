"""The corrected prediction: laws over any watched steps, and cases by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.plan.costs.correction import Watched
from lopt_edge.plan.costs.correction import corrected_bytes as corrected_on

MIB = 1 << 20
BYTES = st.integers(0, 1 << 40)
STEPS = st.lists(st.builds(Watched, BYTES, BYTES, BYTES | st.just(0)), min_size=1, max_size=3)


def with_margin(n_bytes: int) -> int:
    return n_bytes + -(-n_bytes // 25)


def corrected_bytes(watched: list[Watched], largest: int) -> int:
    return corrected_on(watched, largest, device_type="cpu")


def test_a_gpus_margin_is_one_percent():
    assert corrected_on([Watched(1000, 900)], 1000, device_type="cuda") == 909
    assert corrected_bytes([Watched(1000, 900)], 1000) == 936


@given(STEPS, BYTES)
def test_never_below_what_was_measured(watched, largest):
    assert corrected_bytes(watched, largest) >= with_margin(max(step.measured_bytes for step in watched))


@given(STEPS, st.integers(0, 2), BYTES)
def test_the_margin_more_than_measured_if_a_step_as_large_as_the_largest_was_watched(watched, index, more):
    index %= len(watched)
    watched[index] = replace(watched[index], missing_bytes=0)
    largest = max(0, watched[index].predicted_bytes - more)
    assert corrected_bytes(watched, largest) == with_margin(max(step.measured_bytes for step in watched))


@given(STEPS, st.integers(0, 2), BYTES, BYTES, st.sampled_from(["largest", "measured", "missing", "predicted"]))
def test_monotone(watched, index, largest, more, what):
    """More measured, missing or to come is never less; a step that was predicted to take more leaves less to come."""
    index %= len(watched)
    found, changed = corrected_bytes(watched, largest), list(watched)
    if what == "largest":
        assert corrected_bytes(watched, largest + more) >= found
        return
    name = f"{what}_bytes"
    changed[index] = replace(watched[index], **{name: getattr(watched[index], name) + more})
    other = corrected_bytes(changed, largest)
    assert other <= found if what == "predicted" else other >= found


@given(STEPS, BYTES)
def test_the_order_of_steps_does_not_matter_nor_a_step_that_says_nothing_new(watched, largest):
    found = corrected_bytes(watched, largest)
    assert corrected_bytes(watched[::-1], largest) == corrected_bytes([*watched, watched[0]], largest) == found


@given(STEPS, BYTES, BYTES)
def test_an_error_of_the_prediction_that_all_steps_share_is_gone(watched, largest, error):
    """What is predicted too high in every step alike does not count."""
    higher = [replace(step, predicted_bytes=step.predicted_bytes + error) for step in watched]
    assert corrected_bytes(higher, largest + error) == corrected_bytes(watched, largest)


@pytest.mark.parametrize(
    ("watched", "largest", "expected"),
    [
        ([(900, 800, 70), (900, 850, 0)], 900, 850),  # all alike: what the second one took
        ([(900, 800, 70), (500, 800, 0)], 900, 870),  # the largest, without its states
        ([(900, 800, 70), (880, 800, 0)], 900, 820),  # nearly as large, with them
        ([(900, 800, 70)], 900, 870),  # one step
        ([(500, 450, 0), (600, 540, 0)], 900, 840),  # resumed: neither was the largest
        ([(600, 540, 0), (500, 540, 0)], 900, 840),
        ([(900, 950, 0)], 900, 950),  # more than predicted
        ([(900, 0, 0)], 0, 0),
    ],
)  # fmt: skip
def test_by_hand(watched, largest, expected):
    steps = [Watched(*(n * MIB for n in step)) for step in watched]
    assert corrected_bytes(steps, largest * MIB) == with_margin(expected * MIB)
