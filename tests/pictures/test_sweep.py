"""A sweep's picture: marks where the numbers say, hollow where it does not fit, and nothing that breaks it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.pictures.svg import LEFT, RIGHT, TOP, WIDTH
from lopt_edge.pictures.sweep import BYTES_BOTTOM, HEIGHT, INSET, SECONDS_BOTTOM, SECONDS_TOP, CurvePoint, draw_curve

GIB = 1 << 30
SVG = "{http://www.w3.org/2000/svg}"
FIRST, LAST = LEFT + INSET, RIGHT - INSET
NAMES = ("device", "host", "disk", "seconds")


def point(x: float = 1024, fits: bool = True, device: float = 6, **changes) -> CurvePoint:
    return replace(CurvePoint(x, f"{x:g}", fits, int(device * GIB), 0, 0, 4.0), **changes)


def draw(points: list[CurvePoint], **options) -> ElementTree.Element:
    return ElementTree.fromstring(draw_curve(points, **{"title": "a sweep", "x_name": "max-seq-len", **options}))


def words(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def legend(picture: ElementTree.Element, name: str) -> str:
    found = words(picture)
    return found[found.index(name) + 1]


def group(picture: ElementTree.Element, name: str) -> ElementTree.Element | None:
    return picture.find(f".//{SVG}g[@id='{name}']")


def marks(picture: ElementTree.Element, name: str) -> list[tuple[float, float, bool]]:
    """(x, y, filled) of a line's marks."""
    found = []
    for mark in group(picture, name):
        if mark.tag == f"{SVG}circle":
            place = (float(mark.get("cx")), float(mark.get("cy")))
        elif mark.tag == f"{SVG}rect":
            place = (float(mark.get("x")) + 3.5, float(mark.get("y")) + 3.5)
        elif mark.get("fill") == "none":
            continue  # the line
        else:
            x, y = re.match(r"M([\d.]+),([\d.]+)", mark.get("d")).groups()
            place = (float(x), float(y) + 4.5)
        found.append((*place, mark.get("fill") is None))
    return found


def axis_texts(picture: ElementTree.Element) -> list[str]:
    """What stands under the x axis, from left to right."""
    return [e.text for e in picture.iter(f"{SVG}text") if float(e.get("y")) == SECONDS_BOTTOM + 19]


def test_doubling_lengths_are_evenly_spaced_on_a_logarithmic_axis_and_bytes_rise_from_zero():
    picture = draw([point(1024, device=2), point(2048, device=4), point(4096, device=8)])
    found = marks(picture, "device")
    assert [x for x, *_ in found] == pytest.approx([FIRST, (FIRST + LAST) / 2, LAST], abs=0.1)
    heights = [BYTES_BOTTOM - y for _, y, _ in found]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.3)
    assert heights[2] == pytest.approx((BYTES_BOTTOM - TOP) / 1.06, abs=0.1)
    assert group(picture, "device")[0].get("d") == "M" + "L".join(f"{x:g},{y:g}" for x, y, _ in found)


def test_a_linear_axis_is_linear_and_the_order_of_the_points_does_not_matter():
    points = [point(4096), point(1024), point(2048)]
    found = marks(draw(points, log_x=False), "device")
    assert [x for x, *_ in found] == pytest.approx([FIRST, FIRST + (LAST - FIRST) / 3, LAST], abs=0.1)
    assert draw_curve(points, title="", x_name="") == draw_curve(points[::-1], title="", x_name="")


def test_a_point_that_does_not_fit_is_hollow_on_every_line():
    changes = {"host_bytes": GIB, "disk_bytes": 2 * GIB}
    picture = draw([point(1024, **changes), point(2048, fits=False, **changes)])
    for name in NAMES:
        assert [filled for *_, filled in marks(picture, name)] == [True, False]
    assert "does not fit" in words(picture)
    assert "does not fit" not in words(draw([point()]))
    told = [title.text for title in group(picture, "host").iter(f"{SVG}title")]
    assert told == ["max-seq-len 1024: host 1.00 GiB", "max-seq-len 2048: host 1.00 GiB, does not fit"]


@pytest.mark.parametrize(
    ("fits", "where", "at"),
    [
        ("1110", "fits up to 3, not at 4", "at 3, the last that fits"),
        ("0011", "fits from 3 on, not at 2", "at 3, the first that fits"),
        ("111", "every point fits", "at 3"),
        ("000", "no point fits", "at 1, which does not fit"),
        ("10101", "3 of 5 points fit", "at 5, the last that fits"),
        ("1", "fits", "at 1"),
        ("0", "does not fit", "at 1, which does not fit"),
    ],
)
def test_where_fitting_ends_is_said_and_the_legend_tells_that_point(fits, where, at):
    picture = draw([point(n, fit == "1", device=n) for n, fit in enumerate(fits, start=1)], x_name="length")
    assert f"length: {where}" in words(picture)
    assert at in words(picture)
    assert legend(picture, "device") == f"{at.split(',')[0][3:]}.00 GiB"


def test_a_tier_that_never_holds_a_byte_is_left_out_and_zeros_stand_on_the_axis():
    picture = draw([point(1), point(2, host_bytes=3 * GIB)])
    assert group(picture, "disk") is None
    assert "disk" not in words(picture)
    assert marks(picture, "host")[0][1] == BYTES_BOTTOM
    assert legend(draw([point(2), point(1, host_bytes=3 * GIB)]), "host") == "0"


def test_bytes_go_to_a_logarithmic_scale_where_a_lower_tier_would_flatten_the_devices():
    sizes = [0, 0, 40, 80]
    picture = draw([point(1 << n, device=10, host_bytes=size * GIB) for n, size in enumerate(sizes)])
    assert "peak bytes by tier, logarithmic scale" in words(picture)
    assert "peak bytes by tier" in words(draw([point(1, device=10, host_bytes=30 * GIB)]))
    host, device = marks(picture, "host"), marks(picture, "device")
    assert [x for x, *_ in host] == [x for x, *_ in device][2:]  # no place for 0
    assert group(picture, "host")[0].get("d").count("M") == 1
    assert device[0][1] - host[0][1] == pytest.approx(2 * (host[0][1] - host[1][1]), abs=0.2)  # two doublings, one
    assert {"16 GiB", "32 GiB", "64 GiB"} <= set(words(picture))


def test_seconds_go_to_a_logarithmic_scale_where_they_span_much():
    wide = draw([point(n, step_seconds=s) for n, s in ((1, 1.0), (2, 10.0), (3, 100.0))])
    heights = [y for _, y, _ in marks(wide, "seconds")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert {"1 s", "10 s", "100 s"} <= set(words(wide))
    assert_inside(draw([point(1, step_seconds=1e-3), point(2, step_seconds=1e5)]))
    near = draw([point(1, step_seconds=10.0), point(2, step_seconds=20.0)])
    heights = [SECONDS_BOTTOM - y for _, y, _ in marks(near, "seconds")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert "seconds a step" in words(near)


def test_long_steps_are_told_in_minutes_and_hours():
    assert legend(draw([point(step_seconds=786.0)]), "a step") == "13.1 min"
    assert {"min", "10"} <= set(words(draw([point(step_seconds=786.0)])))
    assert legend(draw([point(step_seconds=36000.0)]), "a step") == "10 h"
    assert legend(draw([point(step_seconds=4.51)]), "a step") == "4.51 s"


def test_a_budget_is_drawn_where_it_has_a_place():
    picture = draw([point(device=6)], budget_bytes=8 * GIB)
    line = picture.find(".//*[@id='budget']")
    assert BYTES_BOTTOM - float(line.get("y1")) == pytest.approx((BYTES_BOTTOM - TOP) / 1.06, abs=0.1)
    assert line.get("stroke-dasharray")
    assert legend(picture, "budget") == "8.00 GiB"
    for far in (draw([point(device=6)], budget_bytes=24 * GIB), draw([point(host_bytes=1 << 40)], budget_bytes=1)):
        assert far.find(".//*[@id='budget']") is None
        assert "outside this picture" in words(far)
    assert "budget" not in words(draw([point()]))


def test_ticks_stand_at_every_point_and_their_texts_never_touch():
    picture = draw([point(n, step_seconds=n / 10) for n in range(1, 65)], log_x=False)
    texts = axis_texts(picture)
    assert (texts[0], texts[-1]) == ("1", "64")
    assert 10 < len(texts) < 40
    assert len({x for x, *_ in marks(picture, "device")}) == 64
    crowded = draw([point(1 << n) for n in range(10, 19)], log_x=False)
    assert axis_texts(crowded) == ["1024", "32768", "65536", "131072", "262144"]
    every = draw([point(1 << n) for n in range(10, 19)])
    assert len(axis_texts(every)) == 9


def test_texts_are_escaped_and_cut():
    nasty = 'a <b> & "c" \x00\x1b ]]> \ud800\n</svg>'
    picture = draw([point(x_text=nasty)], title=nasty, x_name=nasty)
    shown = 'a <b> & "c"    ]]>   </svg>'
    assert words(picture)[0] == shown
    assert shown in words(picture)
    assert """at a <b> & "…""" in words(picture)
    long = draw([point(x_text="x" * 500)], title="t" * 500, x_name="n" * 500)
    assert max(len(text) for text in words(long)) <= 110


def test_the_lightest_and_the_heaviest_run_share_a_picture():
    few = point(1, device_bytes=1, step_seconds=1e-9)
    many = point(2, device_bytes=1, host_bytes=1 << 40, disk_bytes=1 << 50, step_seconds=1e9)
    for points in ([few], [many], [few, many], [point(device_bytes=0, step_seconds=0.0)]):
        assert_inside(draw(points))
    assert {"1 B", "1 GiB", "1 TiB", "1 PiB"} <= set(words(draw([few, many])))


def assert_inside(picture: ElementTree.Element) -> None:
    """Marks lie in their plots; texts, as far as their anchors tell, in the picture, and those of an axis apart."""
    for name in NAMES:
        top, bottom = (SECONDS_TOP, SECONDS_BOTTOM) if name == "seconds" else (TOP, BYTES_BOTTOM)
        for x, y, _ in marks(picture, name) if group(picture, name) is not None else ():
            assert FIRST - 0.1 <= x <= LAST + 0.1
            assert top <= y <= bottom
    for element in picture.iter(f"{SVG}text"):
        assert 0 < float(element.get("x")) < WIDTH
        assert 0 < float(element.get("y")) < HEIGHT
    left = [e for e in picture.iter(f"{SVG}text") if float(e.get("x")) == LEFT - 8]
    heights = sorted(float(element.get("y")) for element in left)
    assert all(after - before > 12 for before, after in pairwise(heights))
    assert all(len(element.text) <= 14 for element in left)


AMOUNTS = st.integers(0, 1 << 44) | st.just(0)
POINTS = st.builds(
    CurvePoint,
    st.floats(1e-6, 1e15),
    st.text(max_size=15),
    st.booleans(),
    AMOUNTS,
    AMOUNTS,
    AMOUNTS,
    st.floats(1e-6, 1e8) | st.just(0.0),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=20), st.booleans(), st.none() | st.integers(0, 1 << 46))
def test_whatever_the_points_each_has_its_marks_in_the_plots(points, log_x, budget):
    picture = draw(points, log_x=log_x, budget_bytes=budget)
    assert_inside(picture)
    seconds = marks(picture, "seconds")
    assert [filled for *_, filled in seconds] == [one.fits for one in sorted(points, key=lambda one: one.x)]
    rising = sorted(zip((one.step_seconds for one in sorted(points, key=lambda one: one.x)), seconds, strict=True))
    assert all(before[1][1] >= after[1][1] for before, after in pairwise(rising))  # more seconds, no lower mark
    line = picture.find(".//*[@id='budget']")
    assert line is None or TOP <= float(line.get("y1")) <= BYTES_BOTTOM


@pytest.mark.parametrize(
    ("points", "log_x", "match"),
    [
        ([], True, "at least one point"),
        ([point(0)], True, "point 0 has no place"),
        ([point(float("nan"))], False, "no place"),
        ([point(host_bytes=-1)], True, "fewer than 0"),
        ([point(step_seconds=float("inf"))], True, "inf seconds"),
        ([point(step_seconds=-1.0)], True, "seconds"),
    ],
)
def test_points_that_cannot_be_are_refused(points, log_x, match):
    with pytest.raises(ValueError, match=match):
        draw_curve(points, title="none", x_name="x", log_x=log_x)


def test_zero_has_a_place_on_a_linear_axis():
    assert_inside(draw([point(0), point(5)], log_x=False))
