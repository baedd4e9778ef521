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
STEPS = st.lists(st.builds(Watched, BYTES, BYTES), min_size=1, max_size=3)


def with_margin(n_bytes: int) -> int:
    return n_bytes + -(-n_bytes // 50)


def corrected_bytes(watched: list[Watched], largest: int) -> int:
    return corrected_on(watched, largest, device_type="cpu")


def test_a_gpus_margin_is_one_percent():
    assert corrected_on([Watched(1000, 1100)], 1000, device_type="cuda") == 1111
    assert corrected_bytes([Watched(1000, 1100)], 1000) == 1122


@given(STEPS, BYTES)
def test_the_prediction_stands_or_what_was_measured_is_below(watched, largest):
    found, measured = corrected_bytes(watched, largest), max(step.measured_bytes for step in watched)
    if measured <= max(step.predicted_bytes for step in watched):
        assert found == largest
    else:
        assert found > largest and found >= with_margin(measured)


@given(STEPS, st.integers(0, 2), BYTES, BYTES, st.sampled_from(["largest", "measured", "predicted"]))
def test_monotone(watched, index, largest, more, what):
    """More measured or to come is never less; a step that was predicted to take more leaves less of an error."""
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


@pytest.mark.parametrize(
    ("watched", "largest", "expected"),
    [
        ([(900, 800), (900, 850)], 900, 900),  # holes may still come, up to the prediction
        ([(500, 450), (600, 540)], 900, 900),  # resumed: neither was the largest
        ([(903, 832), (500, 832)], 903, 903),  # of varying lengths: at step 6 it took 925
    ],
)
def test_by_hand_what_was_predicted_stands(watched, largest, expected):
    steps = [Watched(*(n * MIB for n in step)) for step in watched]
    assert corrected_bytes(steps, largest * MIB) == expected * MIB


@pytest.mark.parametrize(
    ("watched", "largest", "expected"),
    [
        ([(900, 950)], 900, 950),  # more than predicted
        ([(900, 890), (500, 930)], 900, 930),  # the second one has states, and holes of the first
        ([(500, 560), (600, 640)], 900, 940),  # resumed: the largest step takes as much more
    ],
)
def test_by_hand_what_was_too_low_gets_the_margin(watched, largest, expected):
    steps = [Watched(*(n * MIB for n in step)) for step in watched]
    assert corrected_bytes(steps, largest * MIB) == with_margin(expected * MIB)
