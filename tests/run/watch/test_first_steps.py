"""`finetune` and its planner: refused before anything is written, started in spite of it, both sides of the first steps.

Runs of one or two steps on the embedded model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lopt_edge import finetune
from lopt_edge.cli import main as cli
from lopt_edge.data import epoch_windows
from lopt_edge.errors import DoesNotFit
from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.watch.first_steps import FirstSteps
from lopt_edge.training.prepare.read import read_inputs
from lopt_edge.training.session.progress import Progress
from tests.plan.plans import make_knobs
from tests.plan.search.test_run_plan import KEYS
from tests.plan.workloads import make_workload
from tools.tiny_runs import make_config

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny-llama"
MIB = 1 << 20


class Noted(Progress):
    """What a run tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def facts(self, rows) -> None:
        self.rows = rows

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def config_of(root: Path, cache: str, **changes: Any) -> Any:
    return make_config(TINY, root, n_rows=12, **{"cache_dir": cache, "max_steps": 2, **changes})


def test_what_cannot_fit_is_refused_and_nothing_is_written(tmp_path, cache, monkeypatch, capsys):
    config = config_of(tmp_path, str(tmp_path / "cache"), device_memory="50MB")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DoesNotFit) as caught:
        finetune(config)
    text = str(caught.value)
    assert "iB needed, 48 MiB allowed" in text and "--device-memory" in text and "--force" in text
    flags = [
        word
        for name in ("model", "data", "output", "cache_dir", "device")
        for word in (f"--{name.replace('_', '-')}", getattr(config, name))
    ]
    monkeypatch.setattr("sys.argv", ["lopt-edge", "finetune", *flags, "--device-memory", "50MB", "--max-seq-len", "128"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 3
    assert "nothing fits the memory budgets" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_force_starts_in_spite_of_it_and_the_budget_is_not_held(tmp_path, cache):
    told, held = Noted(), {"optimizer_states": "device", "weights": "resident", "activations": "keep"}
    need = read_inputs(config_of(tmp_path, cache, **held))[0].run_plan.peak_bytes["device"]
    tight = {**held, "device_memory": f"{need - 40 * MIB}B", "max_steps": 1}
    with pytest.raises(DoesNotFit):
        read_inputs(config_of(tmp_path, cache, **tight))
    result = finetune(config_of(tmp_path, cache, force=True, **tight), told)
    assert result is not None and result.steps == 1
    assert any("DOES NOT FIT" in note for note in told.notes)
    values = json.loads((result.output / "plan.json").read_text())
    assert values["plan"]["fits"] is False and len(values["steps"]) == 1


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, cache):
    told = Noted()
    assert finetune(config_of(tmp_path, cache, dry_run=True), told) is None
    assert [name for name, _ in told.rows] == ["model", "data", "method", "device", "memory", "time"]
    assert "12 examples" in told.rows[1][1] and "2 steps" in told.rows[2][1]
    assert any(note.startswith("memory: weights resident") and "the best of " in note for note in told.notes)
    assert any(note.startswith("predicted for the largest step: fits: device ") for note in told.notes)
    assert any(note.startswith("plan ") and "2 steps" in note for note in told.notes)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, cache: str) -> tuple[Any, dict, dict]:
    """(inputs, plan.json, run.json) of a run of three steps."""
    root = tmp_path_factory.mktemp("run")
    config = config_of(root, cache, max_steps=3, seed=5, optimizer_states="disk")
    inputs, _ = read_inputs(config)
    assert finetune(config) is not None
    return inputs, *(json.loads((Path(config.output) / name).read_text()) for name in ("plan.json", "run.json"))


def test_plan_json_has_both_sides_of_every_op_of_two_steps(done):
    inputs, values, run = done
    assert set(values) == {"plan", "corrected_device_bytes", "steps"} and set(values["plan"]) >= KEYS
    assert values["plan"]["plan_hash"] == run["plan"]["hash"]
    assert [step["step"] for step in values["steps"]] == [1, 2]
    plan = inputs.plan(2)
    for step in values["steps"]:
        assert [row["op"] for row in step["ops"]] == [op.text() for op in plan.ops]
        assert min(row["measured_bytes"] for row in step["ops"]) > 50 * MIB
        assert step["measured_device_bytes"] == max(row["measured_bytes"] for row in step["ops"])
        assert step["predicted_device_bytes"] == max(row["predicted_bytes"] for row in step["ops"])


def test_a_tile_that_the_user_set_is_in_the_plan_that_runs(tmp_path, cache):
    inputs, _ = read_inputs(config_of(tmp_path, cache, token_tile=48))
    assert inputs.knobs.token_tile == inputs.plan(1).tile == 48
    assert inputs.run_plan.reasons["token_tile"] == "as set"


def test_the_first_step_is_the_largest_window(done):
    inputs, values, _ = done
    lengths, config = inputs.train.lengths, inputs.config
    windows = epoch_windows(lengths, seed=5, epoch=0, batch_size=config.batch_size, grad_accum=config.grad_accum)

    def rows(window: Any) -> list[int]:
        return [len(batch) * max(lengths[i] for i in batch) for batch in window]

    assert len({max(rows(window)) for window in windows}) > 1, "the windows differ: this test can fail"
    assert max(rows(windows[0])) == max(max(rows(window)) for window in windows)
    first, second = values["steps"]
    assert first["predicted_device_bytes"] >= second["predicted_device_bytes"]
    assert first["predicted_device_bytes"] <= values["plan"]["peak_bytes"]["device"], "that of the largest possible window"


def test_run_json_keeps_what_was_predicted(done):
    _, values, run = done
    predicted = run["predicted"]
    assert set(predicted) >= {"device_bytes", "host_bytes", "disk_bytes", "journal_bytes", "peak_op", "step_seconds"}
    assert predicted["device_bytes"] == values["plan"]["peak_bytes"]["device"]
    assert predicted["disk_bytes"] == values["plan"]["peak_bytes"]["disk"] > 0
    assert predicted["peak_op"] == values["plan"]["peak_op"]
    assert predicted["step_seconds"] == values["plan"]["step_seconds"] > 0
    assert any(reason.startswith("predicted for the largest step: fits") for reason in run["reasons"])


def test_the_prediction_stands_where_nothing_took_more(done):
    """The first step is as large as the run's largest; only its moments (paged here) are not there yet."""
    _, values, run = done
    measured, corrected = run["peaks"]["peak_device_bytes"], values["corrected_device_bytes"]
    assert corrected >= run["predicted"]["device_bytes"] and corrected >= 0.98 * measured
    assert corrected >= max(step["measured_device_bytes"] for step in values["steps"])


def test_a_run_of_one_step_has_a_correction(tmp_path, cache):
    told, config = Noted(), config_of(tmp_path, cache, max_steps=1)
    assert finetune(config, told) is not None
    values = json.loads((Path(config.output) / "plan.json").read_text())
    (step,) = values["steps"]
    assert values["corrected_device_bytes"] >= max(step["measured_device_bytes"], values["plan"]["peak_bytes"]["device"])


PREDICTION = make_workload(n_tokens=(100,)).predict(make_knobs(4))


@dataclass
class _Executor:
    """As much of one as is watched."""

    observers: list[Any] = field(default_factory=list)
    model: Any = field(default_factory=lambda: SimpleNamespace(device=torch.device("cpu")))
    observed = Executor.observed


def watched(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[int, int]], **how: Any) -> FirstSteps:
    """(step, what the process has at most from then on) in a process that begins with 10 MiB."""
    found, process = FirstSteps(_Executor(), **how), SimpleNamespace(peak=10 * MIB)
    for name in ("peak_rss_bytes", "resident_bytes"):
        monkeypatch.setattr(f"lopt_edge.run.devices.host.{name}", lambda: process.peak)
    for step, peak in steps:
        process.peak = peak
        with found.watching(step, PREDICTION):
            for row in PREDICTION.timeline.rows:
                found.executor.observers[-1](row.op, True)
    return found


def more_than(n_bytes: int) -> int:
    """With the margin of a prediction that was too low."""
    return n_bytes + -(-n_bytes // 50)


def test_what_was_too_low_is_corrected_by_as_much(monkeypatch):
    largest = training_bytes(PREDICTION)
    assert largest < 700 * MIB
    assert watched(monkeypatch, [(9, 700 * MIB)]).corrected_bytes(largest) == more_than(700 * MIB)
    both = watched(monkeypatch, [(1, 700 * MIB), (2, 710 * MIB)]).corrected_bytes(largest)
    assert both == more_than(710 * MIB)
    small = watched(monkeypatch, [(41, 700 * MIB), (42, 700 * MIB)]).corrected_bytes(largest + 100 * MIB)
    assert small == more_than(800 * MIB), "what is to come is larger than the steps that were watched"


def test_an_evaluation_that_was_not_made_yet_is_to_come(monkeypatch):
    large = replace(PREDICTION, saving_bytes=0, evaluation_bytes=PREDICTION.timeline.peak_bytes + 50 * MIB)
    monkeypatch.setattr("tests.run.watch.test_first_steps.PREDICTION", large)
    done, to_come = (watched(monkeypatch, [(7, 700 * MIB)], evaluated=said) for said in (True, False))
    assert done.corrected_bytes(large.device_bytes) == more_than(700 * MIB)
    more = large.device_bytes - replace(large, evaluation_bytes=0).device_bytes
    assert more > 0 and to_come.corrected_bytes(large.device_bytes) == more_than(700 * MIB + more)


def training_bytes(prediction: Prediction) -> int:
    return replace(prediction, saving_bytes=0).device_bytes


def test_the_correction_in_words(monkeypatch):
    found = watched(monkeypatch, [(1, 650 * MIB), (2, 700 * MIB)])
    said = found.correction(training_bytes(PREDICTION))
    assert said.startswith("device memory after step 2: 700 MiB so far; corrected to 714 MiB (")
    low = watched(monkeypatch, [(1, 300 * MIB), (2, 300 * MIB)]).correction(training_bytes(PREDICTION))
    assert low.startswith("device memory after step 2: 300 MiB so far; the ") and low.endswith("that were predicted hold")
    assert watched(monkeypatch, []).corrected_bytes(1) is None


class _Steps(FirstSteps):
    """Without an executor: only what was measured."""

    def __init__(self, predicted: int, measured: int) -> None:
        self.steps = [
            {
                "step": 1,
                "predicted_device_bytes": predicted * MIB,
                "measured_device_bytes": measured * MIB,
                "ops": [
                    {"op": "EMBED mb=0", "measured_bytes": MIB},
                    {"op": "LOSS 1 mb=0", "measured_bytes": measured * MIB},
                ],
            }
        ]


def test_more_than_predicted_is_a_surprise_that_names_the_op():
    assert _Steps(400, 400).surprise(0) is None
    text = _Steps(400, 440).surprise(400 * MIB)
    assert text is not None and "440 MiB at LOSS 1 mb=0, 10.0% more than the 400 MiB predicted" in text
    assert _Steps(400, 440).surprise(450 * MIB) is None, "the holes of a longer step"
