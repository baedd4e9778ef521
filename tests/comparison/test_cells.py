"""The processes of a comparison: children that share the cores, are stopped together, and whose ends are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lopt_edge.comparison.cells import Cell, Job, comparable, environment, failure_of, run_jobs
from lopt_edge.comparison.variants import parse_variants, resolve
from lopt_edge.config.load import load_config, settings_text
from lopt_edge.errors import Interrupted
from lopt_edge.training.checkpoint.output_folder import SETTINGS_NAME


def test_reasons_are_read_off_a_log():
    assert failure_of("step 1\nerror: weights is on fire\n  -> use water\n") == "weights is on fire -> use water"
    assert failure_of("step 1\nerror: one\nTraceback\nValueError: two") == "one Traceback ValueError: two"
    assert failure_of("Traceback\nValueError: two\n") == "ValueError: two"
    assert len(failure_of("error: " + "x" * 999)) == 300


@pytest.mark.parametrize(
    ("text", "setting"), [("let:teacher=beside", "teacher"), ("frozen:boundary_cache=beside", "boundary_cache")]
)
def test_a_cell_with_a_relative_path_finds_its_own_finished_folder(tmp_path, monkeypatch, text, setting):
    """A run's own file has every path absolute, whichever settings are paths; the cell's settings have it as given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside").mkdir()
    base = load_config(None, {"model": "no/model", "data": "data.jsonl", "output": "here"})
    (variant,), errors = parse_variants(text, "--methods")
    folder = tmp_path / "runs" / variant.slug
    cell = Cell(variant, 1e-4, 0, resolve(variant, 1e-4, base=base, common={"seed": 0, "output": str(folder)}))
    assert not errors and cell.settings[setting] == "beside"
    folder.mkdir(parents=True)
    (folder / SETTINGS_NAME).write_text(settings_text(cell.config))  # as `finetune` leaves it
    before = load_config(folder / SETTINGS_NAME)
    assert getattr(before, setting) == str(tmp_path / "beside")
    assert comparable(before) == comparable(load_config(None, cell.settings))
    cell.check()


def test_children_share_the_cores(monkeypatch):
    monkeypatch.setattr("lopt_edge.comparison.cells._cores", lambda: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in environment(1)
    assert [environment(count)["OMP_NUM_THREADS"] for count in (2, 3, 99)] == ["4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [environment(count)["OMP_NUM_THREADS"] for count in (1, 2, 4)] == ["3", "3", "2"]


def test_a_signal_asks_the_children_once_and_waits(tmp_path):
    """A child that takes its time to save is not cut short; nothing new begins."""
    code = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path(sys.argv[1] + ".ready").touch()
time.sleep(30)
"""
    first, second = tmp_path / "first", tmp_path / "second"
    jobs = [
        Job((sys.executable, "-c", code, str(path)), tmp_path / f"{path.name}.log", path.name, lambda: "")
        for path in (first, second)
    ]
    said: list[str] = []

    class Stops:
        def __call__(self, text: str) -> None:
            said.append(text)
            if text == "first ...":
                while not (tmp_path / "first.ready").exists():
                    pass
                raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted, match="go on with the same command"):
        run_jobs(jobs, at_once=1, say=Stops())
    assert first.read_text() == "saved" and not second.exists()
    assert said[-1].startswith("waiting for the runs under way")


def test_a_killed_child_is_told_as_such(tmp_path):
    log = tmp_path / "log"
    run_jobs(
        [Job((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"), log, "one", lambda: "")], at_once=1, say=print
    )
    assert "ended by SIGKILL (out of memory?)" in log.read_text()


def test_the_parent_never_loads_torch():
    code = "import sys, lopt_edge.comparison.run; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
