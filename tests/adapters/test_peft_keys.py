"""adapter_config.json names every key of the installed peft, whether the table of keys is asked or peft itself."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from lopt_edge.adapters import save
from lopt_edge.adapters.peft_keys import PEFT_VERSION

PLAIN = save.AdapterShape(r=4, alpha=8.0, dropout=0.0, targets=("v_proj", "q_proj"), layers=(0, 1), n_layers=2, base="b")
SHAPES = {
    "all layers": PLAIN,
    "some layers": replace(PLAIN, layers=(1,), alpha=7.5, dropout=0.1),
    "of a revision, rank-stabilised, with modules left out": replace(
        PLAIN, rslora=True, revision="abc", excluded=".*vision.*"
    ),
}


def written(shape: save.AdapterShape) -> str:
    return json.dumps(save._all_keys(shape))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_table_and_peft_give_the_same_bytes(shape, monkeypatch):
    found = written(shape)
    monkeypatch.setattr(save, "PEFT_VERSION", "none")
    assert found == written(shape)


def test_the_table_is_that_of_the_peft_that_the_tests_run_with():
    """Else every run would import peft: copy the keys of the new one."""
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"peft=={PEFT_VERSION}" in pins
    assert version("peft") == PEFT_VERSION or f"peft=={version('peft')}" not in pins
