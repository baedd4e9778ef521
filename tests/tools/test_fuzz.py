"""Damaged input of every untrusted kind gives a result or a refusal that names its place: no traceback, hang or memory.

The inputs and the judgement are those of tools/fuzz.py; its long run (`-m long`) reads a million of them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
SHORT = {
    "data": 600,
    "config": 600,
    "headers": 1000,
    "gguf": 300,
    "index": 500,
    "quant-state": 500,
    "plan-text": 600,
    "template": 400,
    "rows": 300,
    "checkpoint": 300,
    "tokenizer": 100,
}
NAMES = {"data": ("d.jsonl", "d.json", "d.csv", "d.txt"), "config": ("run.yaml", "config.json", "adapter_config.json"),
         "headers": ("model.safetensors",), "gguf": ("model.gguf",), "index": ("model.safetensors.index.json",),
         "quant-state": ("model.safetensors",), "plan-text": ("plan.txt",), "template": ("t.jinja",),
         "rows": ("d-0.jsonl", "d-2.jsonl"), "checkpoint": ("state.json",),
         "tokenizer": ("tokenizer.json", "tokenizer_config.json")}  # fmt: skip
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tool() -> Iterator[types.ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))  # where a script finds its siblings
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(ROOT / "tools"))


def judged(tool: types.ModuleType, target: str, folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return tool.outcome(target, folder / name)


@pytest.mark.parametrize("target", SHORT)
def test_damaged_inputs(tool, tmp_path, target):
    tool.warm_up(target, tmp_path)
    found = {"accepted": 0, "rejected": 0}
    for number in range(SHORT[target]):
        name, content = tool.make_input(target, 2026, number)
        what = judged(tool, target, tmp_path, name, content)
        assert what in found, f"input {number}: {what}"
        found[what] += 1
    assert min(found.values()) > SHORT[target] // 20, "valid and broken ones, both"


@pytest.mark.parametrize(("target", "name"), [(target, name) for target, names in NAMES.items() for name in names])
@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tool, tmp_path, target, name, content):
    assert judged(tool, target, tmp_path, name, content) in ("accepted", "rejected")


def test_an_input_can_be_made_again(tool):
    for target in tool.TARGETS:
        assert [tool.make_input(target, 1, 5)] * 2 == [tool.make_input(target, 1, 5) for _ in range(2)]
        assert len({tool.make_input(target, 1, number) for number in range(20)}) > 5


def test_the_watchdog_and_the_judgement_see_failures(tool, tmp_path, monkeypatch):
    from lopt_edge.errors import InputError

    def read(path: Path) -> None:
        text = path.read_text()
        if text == "hang":
            while True:
                pass
        if text == "placeless":
            raise InputError("it is wrong")
        raise KeyError(text)

    monkeypatch.setitem(tool.TARGETS, "data", tool.TARGETS["data"].__class__(1, tool.TARGETS["data"].make, read))
    monkeypatch.setattr(tool, "HANG_SECONDS", 0.2)
    before = signal.signal(signal.SIGPROF, tool._hang)
    try:
        assert "hangs" in tool.read_one("data", tmp_path, "a", b"hang")
        assert "no place" in tool.read_one("data", tmp_path, "a", b"placeless")
        assert "KeyError" in tool.read_one("data", tmp_path, "a", b"other")
    finally:
        signal.signal(signal.SIGPROF, before)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "fuzz.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=3000)


def test_the_tool_counts_writes_and_replays(tmp_path):
    done = run("--inputs", 60, "--target", "plan-text", "--csv", tmp_path / "f.csv", "--failures", tmp_path / "bad")
    assert done.returncode == 0, done.stderr
    assert "plan-text" in done.stdout
    head, row = (tmp_path / "f.csv").read_text().splitlines()
    assert "plan-text,60," in row and head.startswith("date,hardware")
    (tmp_path / "plan-text--0-1--plan.txt").write_text("no plan")
    done = run("--replay", tmp_path / "plan-text--0-1--plan.txt")
    assert done.returncode == 0 and "rejected" in done.stdout


@pytest.mark.long
def test_a_million_inputs(tmp_path):
    done = run("--csv", tmp_path / "f.csv", "--failures", tmp_path / "bad")
    assert done.returncode == 0, done.stdout + done.stderr
