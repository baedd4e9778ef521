"""tools/validate_planner.py: figures of a finished run, and what `show` says of rows old and new. No process is started."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.usefixtures("warm_children")

ROOT = Path(__file__).parents[2]
OLD = "ratio,seconds_ratio,within_budget,error\n1.05,0.9,yes,\n1.08,,yes,\n,,no,exit code 1\n"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))  # where a script finds its sibling
    try:
        spec = importlib.util.spec_from_file_location("validate_planner", ROOT / "tools" / "validate_planner.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def finished(folder: Path, *, device: str) -> Path:
    predicted = {"device_bytes": 1100, "library_bytes": 100, "slack_bytes": 50, "disk_bytes": 70, "step_seconds": 2.0}
    run = {
        "device": device,
        "predicted": predicted,
        "reasons": ["model m", "memory: weights disk"],
        "peaks": {"peak_device_bytes": 1000, "peak_disk_bytes": 60},
    }
    steps = [{"step": n, "loss": 1.0, "step_seconds": 9.0 / n, "peak_device_bytes": 700 + 50 * n} for n in (1, 2, 3)]
    lines = [{"step": 0, "eval_loss": 1.0}, *steps]
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "plan.json").write_text(json.dumps({"corrected_device_bytes": 1020}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("device", "measured"), [("cpu", 1000), ("cuda:0", 1100)])
def test_figures_of_a_run(tool, tmp_path, device, measured):
    """CUDA's context is in both predictions and comes on top of the allocator's peak."""
    found = tool.figures(finished(tmp_path, device=device), 1050)
    assert (found["peak_device_bytes"], found["within_budget"]) == (measured, "yes" if measured <= 1050 else "no")
    assert (found["predicted_device_bytes"], found["ratio"]) == (1100, f"{1100 / measured:.4f}")
    trained = measured - 150
    assert (found["corrected_device_bytes"], found["trained_peak_bytes"]) == (1020, trained), "saving is no part of it"
    assert found["corrected_ratio"] == f"{1020 / trained:.4f}"
    assert (found["steps"], found["step_seconds"], found["knobs"]) == (3, "3.750", "weights disk")
    assert set(found) <= set(tool.PROCESS_COLUMNS) and set(tool.MEASURED_SECONDS) <= set(found)


def test_show_reads_rows_of_before_the_correction_and_new_ones(tool, tmp_path, monkeypatch, capsys):
    path = tmp_path / "planner_process.csv"
    monkeypatch.setattr(tool, "PROCESS", path)
    monkeypatch.setattr(tool, "TENSORS", tmp_path / "none.csv")
    path.write_text(OLD)
    tool.show(Namespace())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["planner_process.csv ratio", "planner_process.csv seconds_ratio"]
    assert "2 runs, 1.0500 to 1.0800" in lines[0] and "failed 1, over the budget 1" in lines[0]
    head, *rows = OLD.splitlines()
    path.write_text("\n".join([f"{head},corrected_ratio", *(f"{row}," for row in rows), "1.09,,yes,,1.012", ""]))
    tool.show(Namespace())
    lines = capsys.readouterr().out.splitlines()
    assert "3 runs, 1.0500 to 1.0900" in lines[0]
    assert lines[1].startswith("planner_process.csv corrected_ratio: 1 runs, 1.0120 to 1.0120")
    assert "corrected ratio" in (tmp_path / "planner_process_corrected_ratio.svg").read_text()


def test_the_kept_rows_have_the_columns_that_are_appended(tool):
    for path, columns in ((tool.TENSORS, tool.TENSOR_COLUMNS), (tool.PROCESS, tool.PROCESS_COLUMNS)):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == columns
        assert all(None not in row and None not in row.values() for row in rows), "every row has every column"
