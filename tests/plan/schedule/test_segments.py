"""Segments cover the depth once and in order, whatever the method; LoPT's split is that of the paper's released code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.errors import InputError
from lopt_edge.plan.schedule.segments import cut_depth
from tests.plan.plans import make_segments

METHODS = st.sampled_from(["lopt", "e2e", "frozen"])


def check_cover(segments, n_layers, method):
    assert [layer for segment in segments for layer in segment.layers] == list(range(n_layers))
    assert [segment.index for segment in segments] == list(range(len(segments)))
    early = {"lopt": "reconstruct", "frozen": "none"}.get(method)
    assert [segment.loss for segment in segments] == [early] * (len(segments) - 1) + ["task"]


@given(method=METHODS, n_layers=st.integers(1, 100), data=st.data())
def test_any_number_of_segments(method, n_layers, data):
    k = data.draw(st.integers(1, n_layers))
    segments = make_segments(method, n_layers=n_layers, num_segments=k)
    check_cover(segments, n_layers, method)
    sizes = [len(segment.layers) for segment in segments]
    if method == "e2e":
        assert sizes == [n_layers]
    else:  # num_layers // k each, the remainder to the first ones
        assert sizes == [n_layers // k + (i < n_layers % k) for i in range(k)]


@given(method=METHODS, n_layers=st.integers(2, 60), data=st.data())
def test_boundaries_by_hand(method, n_layers, data):
    boundaries = sorted(data.draw(st.sets(st.integers(1, n_layers - 1), min_size=1)))
    segments = make_segments(method, n_layers=n_layers, num_segments=999, boundary_layers=tuple(boundaries))
    check_cover(segments, n_layers, method)
    assert [segment.first for segment in segments[1:]] == ([] if method == "e2e" else boundaries)


def test_the_default_split_of_known_depths():
    def starts(n_layers: int, k: int) -> list[int]:
        return [segment.first for segment in make_segments("lopt", n_layers=n_layers, num_segments=k)]

    assert starts(28, 2) == [0, 14]
    assert starts(7, 3) == [0, 3, 5]
    assert starts(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_segments", [0, -1, 5, 1000])
def test_an_impossible_number_is_told(num_segments):
    with pytest.raises(InputError, match=rf"num_segments: {num_segments} .*4 layers") as caught:
        cut_depth("reconstruct", n_layers=4, num_segments=num_segments)
    assert "choose 1 to 4" in str(caught.value)


@pytest.mark.parametrize("boundaries", [[0], [4], [-1], [2, 2], [3, 1], [1, 9]])
@pytest.mark.parametrize("method", ["lopt", "frozen"])
def test_boundaries_out_of_range_or_order_are_told(method, boundaries):
    with pytest.raises(InputError, match="between 1 and 3") as caught:
        make_segments(method, n_layers=4, num_segments=2, boundary_layers=tuple(boundaries))
    assert "boundary_layers" in str(caught.value)
    assert str(boundaries) in str(caught.value)
