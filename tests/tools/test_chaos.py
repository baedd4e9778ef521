"""tools/chaos.py and tools/soak.py: a few kills for real, and that the harnesses fail when they should.

The figures that count (300 kills, 5,000 steps) carry the mark `long`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.system.files import write_json
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, MANIFEST, STATE, name_of, new_checkpoint

pytestmark = pytest.mark.usefixtures("warm_children")

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = {"kills": 3, "in-checkpoint": 1, "in-pages": 1, "in-loading": 1, "steps": 4}


@pytest.fixture(scope="module")
def tools():
    """The modules of tools/ by name."""
    sys.path.insert(0, str(TOOLS))  # where a script finds its siblings
    try:
        import chaos
        import chaos_checks
        import chaos_child
        import soak

        return {module.__name__: module for module in (chaos, chaos_checks, chaos_child, soak)}
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def chaos(tools) -> ModuleType:
    return tools["chaos"]


@pytest.fixture
def checks(tools) -> ModuleType:
    return tools["chaos_checks"]


def run_tool(name: str, path: Path, *, seconds: float, **options: int) -> tuple[str, dict[str, str]]:
    """What the tool printed, and the row it wrote to `path`."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(TOOLS / name), f"--csv={path}", f"--folder={path.parent}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    return done.stdout, row


def check_kills(path: Path, options: dict[str, int], *, seconds: float) -> dict[str, str]:
    said, row = run_tool("chaos.py", path, seconds=seconds, **options)
    table = {found[1].strip(): int(found[2]) for found in re.finditer(r"^(.{34}) *(\d+)", said, re.MULTILINE)}
    for name in ("kills", "in-checkpoint", "in-pages", "in-loading"):
        column = name.replace("-", "_")
        assert table[column] == int(row[column]) >= options[name], said
    assert table["faults"] == int(row["faults"]) == 0
    assert table["runs ended and compared"] == int(row["runs"]) >= 1
    assert int(row["attempts"]) == int(row["kills"]) + int(row["runs"])
    assert "torch" in row["versions"] and "cores" in row["hardware"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no trace of a success
    return row


def test_three_kills_change_nothing(tmp_path):
    """One in each place that has its own rules; some 8 s of one core on a quiet machine, five of them imports."""
    check_kills(tmp_path / "chaos.csv", SMALL, seconds=240)


@pytest.mark.long
def test_three_hundred_kills_change_nothing(tmp_path):
    options = {"kills": 300, "in-checkpoint": 60, "in-pages": 60, "in-loading": 30, "seed": 1}
    row = check_kills(tmp_path / "chaos.csv", options, seconds=3600)
    assert int(row["half_written_checkpoints"]) >= 20 and int(row["in_half_a_page"]) >= 20


# what the harness says of counts and folders ----------------------------------------------------------------------------


def test_the_verdict_misses_no_quota(chaos):
    quotas = chaos.Quotas(kills=4, in_checkpoint=2, in_pages=2, in_loading=1)
    tally = chaos.Tally(runs=1)
    for phases in ({"checkpoint", "page read"}, {"checkpoint"}, {"page write"}, {"start", "load"}):
        tally.add(frozenset(phases))
    assert (tally.kills, tally.in_checkpoint, tally.in_pages, tally.in_loading) == (4, 2, 2, 1)
    assert chaos.verdict(tally, quotas) == []
    for name in vars(quotas):
        short = replace(tally, **{name: getattr(tally, name) - 1})
        assert chaos.verdict(short, quotas) == [f"{name}: 1 fewer than asked for"]
    assert chaos.verdict(replace(tally, runs=0), quotas) == ["no run came to its end"]
    assert chaos.verdict(replace(tally, faults=["spoilt"]), quotas) == ["spoilt"]
    elsewhere = replace(tally, in_checkpoint=0, in_pages=0, in_loading=0, phases=Counter())
    assert len(chaos.verdict(elsewhere, quotas)) == 3  # as many kills, but none where it counts


def test_a_killed_child_is_where_its_marks_say(tools):
    """The marks survive SIGKILL, and what was left before it is not among them."""
    board = tools["chaos_child"].Board()
    assert board.inside() == frozenset()
    child = os.fork()
    if not child:
        for phase, change in (
            ("load", 1),
            ("load", -1),
            ("page read", 1),
            ("page read", 1),
            ("page read", -1),
            ("checkpoint", 1),
        ):
            board.add(phase, change)
        time.sleep(60)
        os._exit(1)
    until = time.monotonic() + 30
    while "checkpoint" not in board.inside() and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert board.inside() == {"page read", "checkpoint"}
    board.clear()
    assert board.inside() == frozenset() and not board.stretched


def a_run(folder: Path) -> Path:
    """What a finished run leaves, as far as it is compared."""
    folder.mkdir()
    (folder / ADAPTER_NAME).write_bytes(b"weights")
    lines = [{"step": step, "loss": 1 / step, "step_seconds": 0.1} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_spoilt_result_is_noticed(checks, tmp_path):
    cache = tmp_path / "cache"
    (cache / "model").mkdir(parents=True)
    (cache / "model" / "model.safetensors").write_bytes(b"four bits")
    output = a_run(tmp_path / "run")
    whole = checks.final_of(output, cache)

    def faults() -> list[str]:
        return list(checks.final_faults(output, cache, whole))

    assert faults() == []
    log = output / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step_seconds": 0.1', '"step_seconds": 0.2'))
    assert faults() == []  # measured
    (output / ADAPTER_NAME).write_bytes(b"weighty")
    assert faults() == [f"{ADAPTER_NAME} differs from the undisturbed run's"]
    log.write_text(log.read_text().replace('"loss": 0.5', '"loss": 0.51'))
    (cache / "model" / "model.safetensors").write_bytes(b"five bits")
    assert len(faults()) == 3
    (output / ADAPTER_NAME).unlink()
    assert len(faults()) == 1 and "cannot be read" in faults()[0]


@pytest.mark.parametrize(
    "name",
    [
        "run/checkpoints/.writing-step-000001-7",
        "run/.lock",
        "run/README.md.partial",
        "cache/model.partial-7-a0b1",
        "run.pages/lopt-pages-7-run.bin",
    ],
)
def test_what_lies_about_is_noticed(checks, tmp_path, name):
    output = a_run(tmp_path / "run")
    whole = checks.final_of(output, tmp_path / "cache")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    expected = "the page folder" if "pages" in name else tmp_path / name
    assert list(checks.final_faults(output, tmp_path / "cache", whole)) == [f"left behind: {expected}"]


def make_checkpoint(output: Path, steps: int) -> Path:
    with new_checkpoint(output / CHECKPOINTS, name_of(steps)) as folder:
        write_json(folder / STATE, {"run": {"steps": steps, "sequences": 0}})
    return output / CHECKPOINTS / name_of(steps)


def test_damaged_and_lost_checkpoints_are_noticed(checks, tmp_path):
    chain = checks.Chain(tmp_path)
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    assert list(chain.faults(keep=2)) == [] and chain.newest == (2, 0)
    (first / MANIFEST).unlink()  # half removed: none any more
    assert list(chain.faults(keep=2)) == []
    (second / STATE).write_text("{}")
    damaged, lost = chain.faults(keep=2)
    assert "a checkpoint with a manifest is damaged" in damaged and "went back from (2, 0) to (0, 0)" in lost
    shutil.rmtree(second)
    for steps in (3, 4, 5, 6):
        make_checkpoint(tmp_path, steps)
    assert list(chain.faults(keep=2)) == [f"4 checkpoints are whole in {tmp_path}, 2 are to be kept"]
    (tmp_path / ADAPTER_NAME).write_bytes(b"\xff" * 100)
    assert any("the adapter cannot be read" in fault for fault in chain.faults(keep=3))


def test_what_is_half_written_names_its_process(checks, tmp_path):
    (tmp_path / "out" / CHECKPOINTS / ".writing-step-000003-77").mkdir(parents=True)
    (tmp_path / "cache" / "tiny-0123.partial-78-a0b1").mkdir(parents=True)
    found = {child: checks.half_written(tmp_path / "out", tmp_path / "cache", child=child) for child in (7, 77, 78)}
    assert found == {7: frozenset(), 77: {"checkpoint"}, 78: {"quantise"}}


# soak -------------------------------------------------------------------------------------------------------------------


def samples_of(soak: ModuleType, **last: float) -> list:
    """A hundred equal samples, of which the last tenth is as told."""
    first = soak.Sample(
        step=50,
        resident_bytes=10**9,
        private_bytes=10**9,
        descriptors=20,
        threads=5,
        page_bytes=10**8,
        step_seconds=0.1,
        cpu_seconds=0.1,
    )
    warm = replace(first, resident_bytes=1, descriptors=1, step_seconds=9.0)
    return [warm] + [first] * 89 + [replace(first, **last)] * 10


def test_the_soak_verdict(tools):
    soak = tools["soak"]
    assert soak.verdict(samples_of(soak)) == []
    within = {
        "resident_bytes": 1.009e9,
        "private_bytes": 5e8,
        "page_bytes": 1.009e8,
        "step_seconds": 0.1049,
        "cpu_seconds": 0.3,
    }
    assert soak.verdict(samples_of(soak, **within)) == []
    beyond = {"resident_bytes": 1.011e9, "private_bytes": 1.011e9, "page_bytes": 1.011e8, "descriptors": 21, "threads": 4,
              "step_seconds": 0.094}  # fmt: skip
    for name, value in beyond.items():
        (said,) = soak.verdict(samples_of(soak, **{name: value}))
        assert name in said or name == "step_seconds"
    assert "too few" in soak.verdict(samples_of(soak)[:19])[0]


def test_a_sample_counts_what_is_there(tools, tmp_path):
    soak = tools["soak"]
    before = soak.take(1, 0.1, 0.1)
    held = bytearray(os.urandom(1 << 24))
    with (tmp_path / "lopt-pages-1-run.bin").open("wb") as file:
        file.truncate(12345)
        Path(file.name).unlink()
        now = soak.take(2, 0.1, 0.1)
    assert (now.page_bytes - before.page_bytes, now.descriptors - before.descriptors) == (12345, 1)
    assert now.resident_bytes - before.resident_bytes > 0.9 * len(held)
    assert now.threads >= 1 and now.private_bytes > 0


@pytest.mark.long
def test_nothing_grows_in_5000_steps(tmp_path):
    _, row = run_tool("soak.py", tmp_path / "soak.csv", seconds=3600)
    assert row["samples"] == "100" and row["faults"] == ""
