"""Curves and pages: what is drawn is what was given, on the plot, escaped; and nothing is fetched from elsewhere."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from lopt_edge.pictures.curves import BOTTOM, LEFT, RIGHT, TOP, Series, curves
from lopt_edge.pictures.html import document, table, words
from lopt_edge.training.checkpoint.log_curves import MOST_POINTS, read_curves, smoothed


def test_points_lie_on_the_plot_in_their_order():
    picture = ElementTree.fromstring(curves([Series("a<b", [(1, 4.0), (5, 3.0), (9, 3.5)])], title="t & u", limit=3.2))
    (line,) = picture.iter("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in places)
    assert places[1][1] > places[2][1] > places[0][1], "the lowest loss is the lowest point"
    assert "a<b: 4 at step 1, 3.5 at step 9" in picture.find("desc").text
    assert len(picture.findall("line[@class='limit']")) == 1


def test_no_points_no_picture_and_one_point_is_one():
    assert curves([Series("x", [])], title="t") == ""
    assert ElementTree.fromstring(curves([Series("x", [(0, 2.0)])], title="t")).findall(".//circle")


def test_a_log_becomes_few_points_and_ends_where_it_is_torn(tmp_path):
    step = {"loss": 2.0, "lr": [1e-3, 2e-3], "tokens": 100, "step_seconds": 0.5, "peak_device_bytes": 7}
    lines = [json.dumps({"step": 0, "eval_loss": 4.0})]
    lines += [json.dumps({**step, "step": n, "loss": float(n % 2)}) for n in range(1, 4001)]
    lines += [json.dumps({"step": 4001, "skipped": "x"}), "{torn"]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))
    found = read_curves(path, n_steps=4000)
    assert len(found.loss) == MOST_POINTS and {y for _, y in found.loss} == {0.5}
    assert found.rate[0] == (10, pytest.approx(2e-3)) and found.speed[-1] == (4000, 200.0)
    assert found.evaluated == {"eval_loss": [(0, 4.0)]} and found.skipped == 1
    assert smoothed([(0, 1.0), (1, 3.0)]) == [(0, 1.0), (1, 3.0)]


def test_a_page_escapes_its_texts_and_asks_nobody():
    page = document("<t>", table([["a", "b"], ["<script>", "x\x1b[2J"]], "c"))
    assert "<script>" not in page and "\x1b" not in page and words("&") == "&amp;"
    assert not re.search(r"(src|href)=|https?://", page)
