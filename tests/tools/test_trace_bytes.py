"""The planner's table of allocations is what our modules and this version of transformers give (tools/trace_bytes.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CASES = {"llama": {"dtype": torch.float32}, "gemma2": {"dtype": torch.bfloat16}}


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))  # where a script finds its siblings
    try:
        import trace_bytes

        return trace_bytes
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize("family", sorted(CASES))
def test_the_committed_programs_are_those_of_this_version(tool, family):
    case = tool.Case(family, **CASES[family])
    committed = tool.unfolded(json.loads(tool.TABLE.read_text(encoding="utf-8")), [family])
    assert committed[case.key] == tool.programs(case), "run tools/trace_bytes.py, and look at what changed"
    assert committed[f"{family} {case.dtype.itemsize}"] == tool.norm_programs(family, case.dtype)
