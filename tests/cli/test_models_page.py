"""`lopt-edge models`: every preset and family is there, with the sizes that follow from its shape."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lopt_edge.cli.models_page import model_rows, models_page
from lopt_edge.plan.facts.families import FAMILIES, WRAPPERS
from lopt_edge.plan.facts.presets import PRESETS


def test_sizes_follow_from_the_shape():
    rows = {row.name: row for row in model_rows()}
    assert rows.keys() == PRESETS.keys()
    llama = rows["llama-3.1-8b"]
    assert llama.n_parameters == 8_030_261_248  # as its model page counts
    matrices = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14336)
    assert llama.four_bit_bytes == pytest.approx(matrices * (0.5 + 1 / 64 + 4 / 16384) + 2 * 2 * 128256 * 4096, rel=1e-3)


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_fits(width):
    text = io.StringIO()
    models_page(Console(file=text, width=width), as_json=False)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(line.startswith(name) for line in lines) for name in PRESETS)
    words = text.getvalue().replace(",", " ").split()
    assert {*FAMILIES, *WRAPPERS} <= set(words)


def test_as_json(capsys):
    models_page(Console(), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["families"] == list(FAMILIES) and found["multimodal"] == list(WRAPPERS)
    assert {preset["name"] for preset in found["presets"]} == set(PRESETS)
    assert all(preset["source"] for preset in found["presets"])
