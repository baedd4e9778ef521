"""The tools, with the words that a developer gives them, on models small enough for a test; what they start is real."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lopt_edge.models.folder import check_weights, find_model, tensor_entries
from tools.tiny_models import make_folder

pytestmark = pytest.mark.usefixtures("warm_children")


@pytest.fixture
def bench(run_tool) -> Callable[..., tuple[int, str, str, list[dict[str, str]]]]:
    """bench_peers for two steps of 12 tokens: exit code, stdout, stderr, and the rows it wrote."""

    def call(model: Path, path: Path, *words: object) -> tuple[int, str, str, list[dict[str, str]]]:
        shared = ("--model", model, "--csv", path, "--seq-len", 12, "--steps", 2, "--threads", 1, "--lora-r", 4)
        found = run_tool("bench_peers", *shared, *words)
        if not path.exists():
            return *found, []
        with path.open(newline="") as file:
            return *found, list(csv.DictReader(file))

    return call


@pytest.mark.parametrize("card", ["RTX 4060 Laptop", pytest.param("", marks=pytest.mark.long)])
def test_the_laptop_table_is_what_the_planner_says(run_tool, card):
    """One card's lines, all with `long`."""
    assert run_tool("laptop_table", "--check", *(("--card", card) if card else ())) == (0, "", "")


def test_bench_host_counts_the_calls_of_a_step_and_times_them(run_tool, tmp_path):
    code, out, err = run_tool("bench_host", "--rounds", 1, "--steps", 1, "--csv", tmp_path / "host.csv")
    assert code == 0, err
    (row,) = csv.DictReader((tmp_path / "host.csv").open())
    assert int(row["calls"]) > 1000 and float(row["us_a_call"]) > 0 and row["times_before"] == "1.0"
    assert f"now: {row['calls']} calls" in out


def losses(row: dict[str, str]) -> list[float]:
    return [float(text) for text in row["losses"].split()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bench") / "tiny", "qwen2", dtype=torch.bfloat16)


def test_bench_peers_compares_e2e_with_the_baseline(bench, tiny, tmp_path):
    code, out, err, rows = bench(tiny, tmp_path / "results" / "peers.csv", "--methods", "e2e,peers")
    assert code == 0, err
    assert [row["method"] for row in rows] == ["quantise", "e2e", "peers"]
    _, ours, theirs = rows
    assert losses(ours)[0] == pytest.approx(losses(theirs)[0], abs=1e-3)
    assert len(losses(ours)) == len(losses(theirs)) == 2
    for row in (ours, theirs):
        assert row["error"] == "" and row["model"] == "tiny" and row["dtype"] == "float32" and row["seq_len"] == "12"
        assert float(row["step_seconds"]) > 0 and float(row["load_seconds"]) > 0 and float(row["import_seconds"]) > 0
        assert int(row["peak_rss_bytes"]) >= int(row["load_peak_rss_bytes"]) > 50 * 2**20
        assert "bitsandbytes" in row["versions"] and "cores" in row["hardware"]
    ratio = int(ours["peak_rss_bytes"]) / int(theirs["peak_rss_bytes"])
    assert float(ours["rss_ratio"]) == pytest.approx(ratio, abs=1e-4)
    assert float(theirs["step_ratio"]) == float(theirs["rss_ratio"]) == 1
    assert "first loss" in out


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_peers_runs_every_method_in_turn(bench, tiny, tmp_path, dtype):
    path = tmp_path / "peers.csv"
    arguments = ("--repeats", 2, "--dtype", dtype, "--cache-dir", tmp_path / "cache")
    code, _, err, rows = bench(tiny, path, *arguments)
    assert code == 0, err
    methods = ["e2e", "lopt", "frozen", "peers"]
    assert [row["method"] for row in rows] == ["quantise", *methods, *methods]
    assert [row["repeat"] for row in rows] == ["", *"11112222"]
    bound = 1e-3 if dtype == "float32" else 2e-2
    assert all(losses(row)[0] == pytest.approx(losses(rows[-1])[0], abs=bound) for row in rows[1:])
    code, _, err, more = bench(tiny, path, *arguments, "--repeats", 1, "--methods", "frozen")
    assert code == 0, err
    assert [row["method"] for row in more[len(rows) :]] == ["frozen"]  # the 4-bit copy was there already
    assert more[-1]["step_ratio"] == ""  # no baseline in this run


def test_bench_peers_tells_what_failed(bench, tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    code, _, _, rows = bench(broken, tmp_path / "peers.csv", "--methods", "e2e")
    assert code == 1
    assert [row["method"] for row in rows] == ["quantise"]
    assert "truncated" in rows[0]["error"]


def test_bench_peers_refuses(bench, tiny, tmp_path):
    code, _, err, _ = bench(tmp_path / "none", tmp_path / "peers.csv")
    assert code == 1 and "no model folder" in err and "Traceback" not in err
    (tmp_path / "other.csv").write_text("step,loss\n1,2\n")
    code, _, err, _ = bench(tiny, tmp_path / "other.csv")
    assert code == 1 and "other columns" in err
    assert (tmp_path / "other.csv").read_text() == "step,loss\n1,2\n"


def test_make_model_writes_a_folder_in_the_real_shape(run_tool, tmp_path):
    folder = tmp_path / "model"
    try:
        words = ("--shape", "qwen2.5-0.5b", "--layers", 1, "--output", folder)
        code, _, err = run_tool("make_model", *words)
        assert code == 0, err
        model = find_model(str(folder))
        check_weights(model, tensor_entries(folder))
        facts = model.facts
        assert (facts.n_layers, facts.hidden_size, facts.vocab_size, facts.tied) == (1, 896, 151936, True)
        assert (folder / "tokenizer.json").exists()
        code, _, err = run_tool("make_model", *words)
        assert code == 1 and "already holds a model" in err
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # 0.3 GB
