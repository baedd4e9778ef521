"""The timeline's picture: well-formed, its peak never lost, every text escaped, at one op and at thousands."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.pictures.step_bytes import (
    BOTTOM,
    COLUMNS,
    HEIGHT,
    LOWER_BOTTOM,
    LOWER_HEIGHT,
    LOWER_TOP,
    OpRow,
    draw_timeline,
)
from lopt_edge.pictures.svg import LEFT, RIGHT, TOP

MIB = 1 << 20
SVG = "{http://www.w3.org/2000/svg}"


def row(text: str = "FORWARD 3 mb=0 keep=input", total: int = 500, **changes) -> OpRow:
    held = {"weights": (total - 100) * MIB, "activations": 90 * MIB, "workspace": 10 * MIB}
    return replace(OpRow(text, held, total * MIB, None), **changes)


def draw(rows: list[OpRow], **options) -> ElementTree.Element:
    return ElementTree.fromstring(draw_timeline(rows, **{"title": "a step", **options}))


def words(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def part(picture: ElementTree.Element, name: str) -> ElementTree.Element | None:
    return picture.find(f".//*[@id='{name}']")


def place(picture: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """The absolute corners of a path."""
    points = []
    for command, numbers in re.findall(r"([MVH])([\d.,]+)", part(picture, name).get("d")):
        values = [float(number) for number in numbers.split(",")]
        x, y = points[-1] if points else (0.0, 0.0)
        points.append({"M": tuple(values[:2]), "V": (x, values[-1]), "H": (values[0], y)}[command])
    return points


def test_the_peak_is_marked_with_its_op_and_bytes():
    rows = [row(total=500), row("LOSS 1 mb=0", total=700), row("BACKWARD 3 mb=0", total=600)]
    picture = draw(rows)
    assert "peak 700.0 MiB at op 1: LOSS 1 mb=0" in words(picture)
    x, y = place(picture, "peak")[0]
    assert x == pytest.approx((LEFT + RIGHT) / 2, abs=0.1)
    assert TOP < y < TOP + 20  # the highest of the picture
    legend = words(picture)
    assert legend[legend.index("weights") + 1] == "600.0 MiB"
    assert legend[legend.index("predicted") + 1] == "700.0 MiB"


def test_categories_are_stacked_in_one_order_whatever_the_rows_say():
    held = {"a new one": MIB, "workspace": 2 * MIB, "library": 3 * MIB, "weights": 4 * MIB, "head": 0}
    picture = draw([row(held=held, peak_bytes=10 * MIB)])
    areas = [path[0].text for path in picture.iter(f"{SVG}path") if len(path)]
    assert areas == ["a new one", "workspace", "weights", "library"]  # from the top
    legend = words(picture)
    places = [legend.index(name) for name in (*areas, "predicted")]
    assert places == sorted(places)
    assert "head" not in legend


def test_what_an_op_takes_beyond_its_categories_is_shown():
    picture = draw([row(peak_bytes=800 * MIB)])
    legend = words(picture)
    assert legend[legend.index("within the op") + 1] == "300.0 MiB"
    assert "within the op" not in words(draw([row()]))


def test_the_measured_line_has_gaps_where_nothing_was_measured():
    measured = [400, 450, None, 480]
    picture = draw([row(measured_bytes=n and n * MIB) for n in measured])
    assert part(picture, "measured").get("d").count("M") == 2
    legend = words(picture)
    assert legend[legend.index("measured") + 1] == "400.0 MiB"  # at the first of the equal peaks
    assert legend[legend.index("measured, highest") + 1] == "480.0 MiB"
    assert part(draw([row()]), "measured") is None


def test_a_budget_is_drawn_where_it_does_not_flatten_the_rest():
    picture = draw([row()], budget_bytes=800 * MIB)
    height = float(part(picture, "budget").get("y1"))
    assert TOP < height < place(picture, "peak")[0][1]
    far = draw([row()], budget_bytes=24 << 30)
    assert part(far, "budget") is None
    assert "24,576.0 MiB" in words(far) and "above this picture" in words(far)
    assert "budget" not in words(draw([row()]))


def test_texts_are_escaped():
    nasty = 'a <b> & "c" \x00\x1b ]]> \ud800\n</svg>'
    picture = draw([row(nasty, held={nasty: 500 * MIB})], title=nasty, baseline=nasty)
    shown = 'a <b> & "c"    ]]>   </svg>'
    assert words(picture)[:2] == [shown, shown]
    assert f"peak 500.0 MiB at op 0: {shown}" in words(picture)


def test_long_texts_are_cut():
    picture = draw([row("BACKWARD " * 50)], title="title " * 100, baseline="baseline " * 100)
    assert max(len(text) for text in words(picture)) <= 140


@pytest.mark.parametrize("n_rows", [1, 2, 999, COLUMNS, COLUMNS + 1, 5000])
def test_many_ops_never_lose_the_peak(n_rows):
    rows = [row(f"FORWARD {i}", total=500 + i % 7, measured_bytes=500 * MIB) for i in range(n_rows)]
    at = n_rows * 2 // 3
    rows[at] = row("LOSS 1 mb=0", total=900)
    text = draw_timeline(rows, title="many", budget_bytes=1000 * MIB)
    assert len(text) < 250_000
    picture = ElementTree.fromstring(text)
    assert f"peak 900.0 MiB at op {at:,}: LOSS 1 mb=0" in words(picture)
    x, y = place(picture, "peak")[0]
    assert x == pytest.approx(LEFT + (at + 0.5) / n_rows * (RIGHT - LEFT), abs=3)
    top = min(y for path in picture.iter(f"{SVG}path") if len(path) for y in heights(path))
    assert top == y


def heights(path: ElementTree.Element) -> list[float]:
    return [float(number) for number in re.findall(r"V([\d.]+)", path.get("d"))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 41), st.integers(0, 1 << 41), st.none() | st.integers(0, 1 << 42)), min_size=1),
    st.none() | st.integers(0, 1 << 44),
)
def test_whatever_the_bytes_the_picture_is_well_formed_and_inside_its_frame(figures, budget):
    rows = [OpRow("STEP 0", {"weights": held}, held + more, measured) for held, more, measured in figures]
    picture = draw(rows, budget_bytes=budget)
    for name in ("peak", "measured", "budget"):
        found = part(picture, name)
        points = [] if found is None else place(picture, name) if name != "budget" else [(LEFT, float(found.get("y1")))]
        assert all(LEFT <= x <= RIGHT and TOP - 1 <= y <= BOTTOM for x, y in points)
    ticks = [text for text in words(picture) if re.fullmatch(r"[\d,.]+", text)]
    assert 3 <= len(ticks) <= 20


def test_rows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least one op"):
        draw_timeline([], title="none")
    with pytest.raises(ValueError, match=r"op 1 \(FORWARD 3 mb=0 keep=input\) holds"):
        draw_timeline([row(), row(peak_bytes=1)], title="too low")
    with pytest.raises(ValueError, match="fewer than 0"):
        draw_timeline([row(held={"weights": -1})], title="negative")
    with pytest.raises(ValueError, match=r"op 0 .* on a lower tier"):
        draw_timeline([row(disk_bytes=-1)], title="negative")


# --- the tiers below --------------------------------------------------------------------------------------------------


def test_what_lies_on_the_tiers_below_is_drawn_under_the_same_ops():
    hosts = [0, 300, 300, 100]
    rows = [row(host_bytes=host * MIB, disk_bytes=50 * MIB) for host in hosts]
    picture = draw(rows)
    assert float(picture.get("height")) == LOWER_HEIGHT
    full = (LOWER_BOTTOM - LOWER_TOP) / 1.04 / 300  # px a MiB
    quarter = (RIGHT - LEFT) / 4
    expected = [(0, 0), (1, 0), (1, 300), (3, 300), (3, 100), (4, 100)]
    for (x, y), (op, amount) in zip(place(picture, "host"), expected, strict=True):
        assert x == pytest.approx(LEFT + op * quarter, abs=0.1)
        assert y == pytest.approx(LOWER_BOTTOM - amount * full, abs=0.1)
    assert [y for _, y in place(picture, "disk")] == pytest.approx([LOWER_BOTTOM - 50 * full] * 2, abs=0.1)
    legend = words(picture)
    assert legend[legend.index("host") + 1] == "300.0 MiB"
    assert legend[legend.index("disk") + 1] == "50.0 MiB"
    assert sum(text == "op of the step (4 in all)" for text in legend) == 1


def test_a_picture_without_lower_tiers_has_no_plot_for_them_and_one_tier_alone_no_line_for_the_other():
    plain = draw([row()])
    assert float(plain.get("height")) == HEIGHT
    assert part(plain, "host") is part(plain, "disk") is None
    assert not {"host", "disk", "on the tiers below"} & set(words(plain))
    disk = draw([row(), row(disk_bytes=1)])
    assert part(disk, "host") is None and part(disk, "disk") is not None
    assert "host" not in words(disk)


def test_the_main_plot_is_the_same_with_and_without_lower_tiers():
    rows = [row(total=500 + i, measured_bytes=500 * MIB) for i in range(50)]
    plain, both = (draw(rows, budget_bytes=800 * MIB) for rows in (rows, [replace(one, host_bytes=MIB) for one in rows]))
    for name in ("peak", "measured"):
        assert part(plain, name).get("d") == part(both, name).get("d")
    areas = [[path.get("d") for path in picture.iter(f"{SVG}path") if len(path)] for picture in (plain, both)]
    assert areas[0] == areas[1]
    assert [text for text in words(plain) if text not in words(both)] == []


@pytest.mark.parametrize("n_rows", [1, COLUMNS + 1, 20_000])
@pytest.mark.parametrize("n_bytes", [1, 1 << 40])
def test_many_ops_never_lose_the_highest_of_a_lower_tier(n_rows, n_bytes):
    rows = [row() for _ in range(n_rows)]
    at = n_rows // 3
    rows[at] = row(total=400, host_bytes=n_bytes, disk_bytes=n_bytes)  # not the op that its column shows
    text = draw_timeline(rows, title="many")
    assert len(text) < 250_000
    for tier in ("host", "disk"):
        corners = place(ElementTree.fromstring(text), tier)
        top = min(y for _, y in corners)
        assert top == pytest.approx(LOWER_BOTTOM - (LOWER_BOTTOM - LOWER_TOP) / 1.04, abs=0.1)
        start, end = (x for x, y in corners if y == top)
        assert start - 0.1 <= LEFT + (at + 0.5) / n_rows * (RIGHT - LEFT) <= end + 0.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 42), st.integers(0, 1 << 42)), min_size=1, max_size=40))
def test_lower_tiers_stay_in_their_plot_and_start_and_end_with_their_bytes(figures):
    picture = draw([row(host_bytes=host, disk_bytes=disk) for host, disk in figures])
    highest = max(map(max, figures))
    for index, name in enumerate(("host", "disk")):
        values = [figure[index] for figure in figures]
        if not any(values):
            assert part(picture, name) is None
            continue
        corners = place(picture, name)
        assert all(LEFT <= x <= RIGHT and LOWER_TOP <= y <= LOWER_BOTTOM for x, y in corners)
        assert (corners[0][0], corners[-1][0]) == (LEFT, RIGHT)
        for (_, y), value in ((corners[0], values[0]), (corners[-1], values[-1])):
            share = value / highest / 1.04
            assert y == pytest.approx(LOWER_BOTTOM - share * (LOWER_BOTTOM - LOWER_TOP), abs=0.1)
