"""The memory benchmark: real runs in processes of their own become rows; its figures where no process is needed."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.usefixtures("warm_children")

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))  # where a script finds its sibling
    try:
        spec = importlib.util.spec_from_file_location("bench_memory", ROOT / "tools" / "bench_memory.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the 4-bit copy lies: it is made once, by whichever test is first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(run_tool, cache) -> Callable[..., tuple[int, str, list[dict[str, str]]]]:
    """(exit code, stdout, rows) of the tool with these arguments."""

    def call(path: Path, *words: object) -> tuple[int, str, list[dict[str, str]]]:
        shared = ("--csv", path, "--threads", 1, "--lora-r", 4, "--cache-dir", cache)
        code, out, _ = run_tool("bench_memory", *shared, *words)
        with path.open(newline="") as file:
            return code, out, list(csv.DictReader(file))

    return call


def test_a_whole_run_becomes_a_row(bench, tmp_path):
    path = tmp_path / "results" / "memory.csv"
    arguments = ("--model", TINY, "--seq-len", 24, "--methods", "lopt", "--no-baseline", "--flag=--seed 7")
    code, out, rows = bench(path, *arguments)
    assert code == 0
    (row,) = rows
    assert row["error"] == "" and row["method"] == "lopt" and row["settings"] == "resident" and row["repeat"] == "1"
    assert row["model"] == "tiny-llama" and int(row["n_layers"]) > 1 and row["seq_len"] == "24" and row["steps"] == "2"
    assert row["flags"].startswith("--weights resident") and row["flags"].endswith(" --seed 7")
    assert row["dtype"] == "float32" and "cores" in row["hardware"]
    peak = int(row["peak_rss_bytes"])
    assert 100 * 2**20 < peak < 2 * 2**30 and int(row["peak_device_bytes"]) == peak
    if Path("/usr/bin/time").exists():
        assert int(row["peak_rss_time_bytes"]) == pytest.approx(peak, rel=0.01) and row["peaks_agree"] == "yes"
    assert 0 < float(row["step_seconds"]) < float(row["wall_seconds"]) and float(row["tokens_per_second"]) > 0
    assert 1 < float(row["first_loss"]) < 20 and row["losses_equal"] == "yes"
    assert row["step_ratio"] == row["rss_ratio"] == ""
    assert "tiny-llama" in out and "1 rows appended" in out


@pytest.mark.long
def test_settings_lengths_and_the_baseline_side_by_side(bench, tmp_path):
    arguments = ("--model", TINY, "--methods", "e2e", "--sweep-seq", "32,64", "--repeats", 2, "--steps", 3)
    code, out, rows = bench(tmp_path / "memory.csv", *arguments)
    assert code == 0
    assert [row["method"] for row in rows] == ["peers", "e2e"] * 4
    assert [row["losses_equal"] for row in rows] == ["", "yes"] * 4
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        ratio = int(ours["peak_rss_bytes"]) / int(theirs["peak_rss_bytes"])
        assert float(ours["rss_ratio"]) == pytest.approx(ratio, abs=1e-4)
    assert out.count("MiB per 1,000 tokens") == 2


def test_a_failed_run_is_a_row_with_its_message(bench, tmp_path):
    arguments = ("--model", TINY, "--seq-len", 24, "--methods", "e2e", "--no-baseline", "--flag=--no-such-flag")
    code, out, rows = bench(tmp_path / "memory.csv", *arguments)
    assert code == 1
    assert "exit code 2: No such option" in rows[0]["error"] and rows[0]["peak_rss_bytes"] == ""
    assert "failed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "24"], "name a --model"),
        (["--model", TINY], "name a --seq-len"),
        (["--model", TINY, "--seq-len", "1"], "at least 2 tokens"),
        (["--model", TINY, "--seq-len", "24", "--methods", "peers"], "--methods knows"),
        (["--model", TINY, "--seq-len", "24", "--settings", "none"], "invalid choice"),
        (["--model", TINY, "--seq-len", "24", "--cap-gib", "8"], "only with --device cuda"),
        (["--model", TINY, "--sweep-seq", "64,x"], "--sweep-seq"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.parse([str(word) for word in arguments])
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tool, tmp_path, monkeypatch):
    path = tmp_path / "memory.csv"
    monkeypatch.setattr(
        sys, "argv", ["bench_memory", "--model", str(tmp_path / "none"), "--seq-len", "8", "--csv", str(path)]
    )
    with pytest.raises(SystemExit, match="no model folder"):
        tool.main()
    assert not path.exists()


def test_growth_is_the_least_squares_line(tool):
    def row(seq_len: int, n_layers: int, mib: float, **changes: object) -> dict[str, object]:
        shape = f"qwen2 {n_layers} x 896/4864, vocabulary 151936"
        return {"shape": shape, "n_layers": n_layers, "seq_len": seq_len, "method": "e2e", "settings": "resident",
                "device": "cpu", "peak_rss_bytes": mib * 2**20, "peak_device_bytes": 1.0, **changes}  # fmt: skip

    lengths = [row(seq_len, 24, 600 + seq_len / 10) for seq_len in (500, 1000, 4000)]
    depths = [row(500, n_layers, 410 + 10 * n_layers + wave) for n_layers, wave in ((4, 0), (8, 1), (12, 0))]
    lines = list(tool.growth([*lengths, *depths, row(9000, 24, 1, error="failed"), row(700, 3, 1)]))
    assert len(lines) == 2
    assert "n_layers 24: e2e resident: peak RSS +100.00 MiB per 1,000 tokens (line from 600 MiB at 0; 3 rows" in lines[0]
    assert "MiB per layer" in lines[1] and "4 rows" in lines[1]  # 24 layers at 500 tokens is of the same shape


def test_only_peaks_within_one_percent_agree(tool):
    assert tool.agree({"peak_rss_bytes": 1000, "peak_rss_time_bytes": 1009}) == "yes"
    assert tool.agree({"peak_rss_bytes": 1000, "peak_rss_time_bytes": 1020}) == "no"
    assert tool.agree({"peak_rss_bytes": 1000, "peak_rss_time_bytes": None}) == ""
