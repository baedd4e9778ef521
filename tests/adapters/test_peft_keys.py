"""adapter_config.json names every key of peft, byte for byte as peft would write it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from peft import LoraConfig

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


@pytest.mark.skipif(version("peft") != PEFT_VERSION, reason="another peft has other keys")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_table_has_the_keys_and_defaults_of_peft(shape):
    values = LoraConfig(**shape.config()).to_dict()
    found = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(values.items())}
    assert json.dumps(save._all_keys(shape)) == json.dumps(found)


def test_the_table_is_of_the_peft_that_the_tests_run_with():
    """Else the comparison above is left out: copy the keys of the new one."""
    assert f"peft=={PEFT_VERSION}" in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
