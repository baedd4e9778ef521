"""tools/bench_prediction.py: its data files have the lengths that they are named for; what it makes of a run's files."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from lopt_edge.data import load_dataset
from lopt_edge.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("warm_children")

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))  # where a script finds its siblings
    try:
        spec = importlib.util.spec_from_file_location("bench_prediction", ROOT / "tools" / "bench_prediction.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_prediction"] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("tokens", [32, 512])
def test_lengths_are_what_they_are_named_for(tool, tmp_path, tokens):
    tokenizer = load_tokenizer(ROOT / "examples" / "tiny-llama")
    found = {
        name: load_dataset(tool.data_file(name, tokens, tmp_path), tokenizer, max_seq_len=tokens).lengths
        for name in tool.LENGTHS
    }
    assert set(found["fixed"]) == {tokens}
    assert max(found["uniform"]) <= tokens * 1.2 and min(found["uniform"]) < tokens / 2, "about four tokens a word"
    assert max(found["code"]) == tokens, "one sets the peak"
    assert len({*found["code"]}) > (4 if tokens > 100 else 1)


def test_figures_are_of_the_whole_process_saving_included(tool, tmp_path):
    predicted = {"device_bytes": 500 * MIB, "library_bytes": 360 * MIB, "slack_bytes": 50 * MIB,
                 "corrected_device_bytes": 520 * MIB}  # fmt: skip
    reasons = ["memory: all on disk (the best of 9)"]
    run = {"predicted": predicted, "peaks": {"peak_rss_bytes": 490 * MIB}, "reasons": reasons}
    (tmp_path / "run.json").write_text(json.dumps(run))
    lines = [{"step": 0, "eval_loss": 1.0}, *({"step": n, "loss": 1.0, "tokens": 9 * n, "peak_rss_bytes": (470 + n) * MIB}
                                              for n in (1, 2))]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = tool.figures(tmp_path, 480 * MIB)
    assert (found["ratio"], found["corrected_ratio"], found["within_budget"]) == ("1.0204", "1.0612", "no")
    assert (found["step_peaks_mib"], found["step_tokens"], found["trained_peak_bytes"]) == ("471 472", "9 18", 472 * MIB)
    assert found["knobs"] == "all on disk" and set(found) <= set(tool.COLUMNS)


def test_show_tells_all_rows_and_each_models(tool, tmp_path, capsys):
    path = tmp_path / "prediction.csv"
    rows = [("a", 1.0, 1.01, "yes", ""), ("a", 1.04, 1.04, "yes", "")]
    rows += [("b", 0.97, 0.99, "no", ""), ("b", "", "", "no", "x")]
    names = ("model", "ratio", "corrected_ratio", "within_budget", "error")
    path.write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows), ""]))
    tool.show(Namespace(csv=path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "3 runs, 0.970 to 1.040, median 1.000; failed 1, over the budget 2" in lines[0]
    assert "  2 runs, 1.000 to 1.040" in lines[1] and "  1 runs, 0.970 to 0.970" in lines[2]
    assert "3 runs" in (tmp_path / "prediction_corrected_ratio.svg").read_text()


def test_the_kept_rows_have_the_columns_that_are_appended(tool):
    with tool.RESULTS.open(newline="") as file:
        assert tuple(csv.DictReader(file).fieldnames) == tool.COLUMNS
