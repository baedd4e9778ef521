"""Faults after which a run goes on by itself: memory that is refused, numbers that are not finite, a loss that rises.

Memory is refused by raising what Python and torch raise, in a chosen op; numbers are spoilt for real, in a weight or by a
learning rate. What is compared is the adapter, bit for bit, with that of a run in which nothing happened.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lopt_edge import finetune
from lopt_edge.config.settings import Config
from lopt_edge.errors import RunError
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.plan.schedule.ops import Op
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS
from lopt_edge.training.checkpoint.run_state import LEVEL_STEPS, LossLevel
from lopt_edge.training.prepare.read import read_inputs
from lopt_edge.training.recovery import _search, smaller_plan
from lopt_edge.training.session import loaded
from lopt_edge.training.session.progress import Progress
from tools.tiny_runs import make_config, make_model

FIXED = {"weights": "disk", "activations": "recompute", "saved_inputs": "disk", "optimizer_states": "disk",
         "gradients": "disk", "prefetch": 0, "token_tile": 256}  # fmt: skip
ROOT = Path(__file__).parents[2]
Happen = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def happen(monkeypatch) -> Happen:
    """(step, pattern, act, times): `act(executor)` before ops of that step that match, so many times."""

    def arrange(step: int, pattern: str, act: Callable[[Any], None], *, times: int = 1) -> None:
        build, left = loaded.build_executor, [act] * times

        def with_act(*arguments: Any, **options: Any) -> Any:
            executor, shape = build(*arguments, **options)

            def wrapped(method: Callable[[Any, Op], None]) -> Callable[[Any, Op], None]:
                def call(state: Any, op: Op) -> None:
                    if left and executor.model.clock.step == step and re.search(pattern, op.text()):
                        left.pop()(executor)
                    method(state, op)

                return call

            executor.methods = {kind: wrapped(method) for kind, method in executor.methods.items()}
            return executor, shape

        monkeypatch.setattr(loaded, "build_executor", with_act)

    return arrange


class Listener(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def events(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "events.jsonl").read_text().splitlines()]


def adapter(config: Config) -> bytes:
    return (Path(config.output) / ADAPTER_NAME).read_bytes()


def log(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def refuse(error: Exception) -> Callable[[Any], None]:
    def act(executor: Any) -> None:
        raise error

    return act


# memory ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Config:
    """The settings of four steps in which nothing happened."""
    config = make_config(model, tmp_path_factory.mktemp("whole"), n_rows=15, max_steps=4)
    finetune(config)
    return config


@pytest.mark.parametrize(
    ("op", "error"),
    [
        pytest.param("FORWARD 2", MemoryError("no room"), marks=pytest.mark.long),
        ("LOSS 0", torch.OutOfMemoryError("CUDA out of memory")),
        ("BACKWARD 1 mb=1", RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")),
        ("STEP layer 2", MemoryError("no room")),
    ],
)
def test_a_smaller_plan_takes_over_and_no_bit_changes(model, tmp_path, happen, whole, op, error):
    happen(3, f"^{op}", refuse(error))
    config, listener = make_config(model, tmp_path, n_rows=15, max_steps=4), Listener()
    assert finetune(config, listener).steps == 4
    assert adapter(config) == adapter(whole)
    assert [line["loss"] for line in log(config)] == [line["loss"] for line in log(whole)]
    (event,) = events(config)
    assert (event["event"], event["after_step"]) == ("out of memory", 2) and "next plan" in event["next"]
    assert any("after step 2 memory ran out" in text for text in listener.warnings)


def test_a_smaller_plan_is_asked_for_with_the_teachers_pass(model, tmp_path):
    """Else a plan could be taken as smaller which the teacher's pass, made again before it, does not fit."""
    wide = make_model(tmp_path / "wide", hidden_size=96, num_hidden_layers=2)
    config = make_config(model, tmp_path, method="let", teacher=str(wide), max_steps=2, batch_size=4, grad_accum=1)
    inputs, _ = read_inputs(config)
    assert inputs.workload.teacher is not None
    assert _search(inputs).workload.teacher == inputs.workload.teacher
    found = smaller_plan(inputs)
    assert found is not None and found[0].workload.teacher == inputs.workload.teacher


def test_in_the_first_step_too(model, tmp_path, happen):
    whole = make_config(model, tmp_path, output="whole", max_steps=2)
    finetune(whole)
    happen(1, "^BACKWARD 3", refuse(MemoryError()))
    config = make_config(model, tmp_path, max_steps=2)
    finetune(config)
    assert adapter(config) == adapter(whole)


def test_where_every_knob_is_fixed_micro_batches_are_split(model, tmp_path, happen):
    """Equal up to rounding, and said."""
    whole = make_config(model, tmp_path, output="whole", max_steps=3, n_rows=12, **FIXED)
    finetune(whole)
    happen(2, "^FORWARD 1", refuse(MemoryError()))
    config, listener = make_config(model, tmp_path, max_steps=3, n_rows=12, **FIXED), Listener()
    finetune(config, listener)
    assert any("micro-batches of 2 are split into 1" in text for text in listener.warnings)
    for one, other in zip(log(config), log(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert (one["tokens"], one["lr"]) == (other["tokens"], other["lr"])


def test_a_checkpoint_inside_a_split_window_goes_on_unsplit(model, tmp_path, happen, monkeypatch):
    """Stopped after one of two sequences of what is one micro-batch again later: that step begins again."""
    whole = make_config(model, tmp_path, output="whole", max_steps=3, n_rows=12, **FIXED)
    finetune(whole)
    settings = {**FIXED, "save_minutes": 1e-9}  # a checkpoint at every chance
    happen(2, "^FORWARD 1", refuse(MemoryError()))
    config = make_config(model, tmp_path, max_steps=3, n_rows=12, keep=99, **settings)
    finetune(config)
    root = Path(config.output) / CHECKPOINTS
    inside = root / "step-000001+1"
    assert inside.is_dir(), sorted(path.name for path in root.iterdir())
    listener = Listener()
    finetune(config.model_copy(update={"resume": str(inside)}), listener)
    assert any("step 2 begins again" in text for text in listener.warnings)
    assert adapter(config) == adapter(whole)


def test_where_nothing_smaller_is_left_the_run_stops_with_a_checkpoint(model, tmp_path, happen):
    happen(2, "^FORWARD 1", refuse(MemoryError()))
    config = make_config(model, tmp_path, max_steps=3, batch_size=1, n_rows=12, **FIXED)
    with pytest.raises(RunError, match=r"(?s)there is no smaller plan.*close other programs") as caught:
        finetune(config)
    assert f"{CHECKPOINTS}/step-000001" in str(caught.value)
    whole = make_config(model, tmp_path, output="whole", max_steps=3, batch_size=1, n_rows=12)
    finetune(whole)
    finetune(config.model_copy(update={"resume": "auto"}))
    assert adapter(config) == adapter(whole)


def test_after_three_plans_it_stops(model, tmp_path, happen):
    happen(2, "^FORWARD 1", refuse(MemoryError()), times=100)
    config = make_config(model, tmp_path, max_steps=3, n_rows=12)
    with pytest.raises(RunError, match=r"(?s)smaller plan"):
        finetune(config)
    assert 1 <= len(events(config)) <= 3
    assert [path.name for path in (Path(config.output) / CHECKPOINTS).iterdir()] == ["step-000001"]


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory) -> Path:
    """Where the 4-bit copy of the example model lies, so that no child makes it."""
    cache = tmp_path_factory.mktemp("cache")
    four_bit_folder(find_model(str(ROOT / "examples" / "tiny-llama")), cache_dir=str(cache))
    return cache


CAPPED = """
import sys
from lopt_edge.training.session import session
from lopt_edge.cli.main import main
from lopt_edge.run.devices.interface import Wall
from lopt_edge.system.memory import cap_data_bytes
session.hold_budget = lambda *arguments, **options: Wall(cap_data_bytes(MIB << 20).lift)
sys.argv = ["lopt-edge", *sys.argv[1:]]
main()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit needs Linux")
@pytest.mark.parametrize(("mib", "code"), [(20, 0), pytest.param(4, 1, marks=pytest.mark.long)])
@pytest.mark.usefixtures("warm_children")
def test_memory_that_the_kernel_refuses(tmp_path, tiny_cache, mib, code):
    """A limit that the plan knows nothing of, in a child: it ends well with smaller plans, or says why not."""
    program = CAPPED.replace("MIB", str(mib))
    rows = (ROOT / "examples" / "data" / "docstrings-train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:24]))
    words = ["finetune", "--model", str(ROOT / "examples" / "tiny-llama"), "--data", str(tmp_path / "train.jsonl"),
             "--output", str(tmp_path / "out"), "--cache-dir", str(tiny_cache), "--max-steps", "1", "--batch-size",
             "8", "--grad-accum", "1", "--max-seq-len", "256", "--device", "cpu", "--compute-dtype", "float32",
             "--method", "lopt"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    assert "memory ran out" in done.stderr
    if code:
        assert "smaller plan" in done.stderr and "close other programs" in done.stderr
    else:
        assert (tmp_path / "out" / ADAPTER_NAME).exists()


# numbers ---------------------------------------------------------------------------------------------------------------


def spoil(value: float) -> Callable[[Any], None]:
    """The hidden states of the step under way, in one place."""

    def act(executor: Any) -> None:
        executor.state.hidden_BTD = executor.state.hidden_BTD.clone()
        executor.state.hidden_BTD[0, 0, 0] = value

    return act


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_batch_is_skipped_and_leaves_no_trace(model, tmp_path, happen, value):
    """What follows is what follows where that step never was; the op where it began is named."""
    happen(2, "^FORWARD 1 mb=0", spoil(value), times=2)  # in the step, and again when it is looked at
    settings = {"n_rows": 15, "max_steps": 4, "schedule": "constant", "warmup_ratio": 0.0}
    config, listener = make_config(model, tmp_path, **settings), Listener()
    assert finetune(config, listener).steps == 4
    lines = log(config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "skipped" in lines[1] and "loss" not in lines[1]
    (event,) = events(config)
    assert event["step"] == 2 and event["op"].startswith("FORWARD 1 mb=0")
    dump = json.loads((Path(config.output) / event["file"]).read_text())
    assert re.search(r"train\.jsonl:\d+", dump["micro_batches"][0][0]["where"])
    assert sum(len(batch) for batch in dump["micro_batches"]) == 4
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(Path(config.output) / ADAPTER_NAME).values())
    run = json.loads((Path(config.output) / "run.json").read_text())
    assert run["totals"]["skipped_steps"] == 1
    assert any("it is skipped" in text for text in listener.warnings)


def test_a_gradient_that_is_not_finite_is_found_where_it_began(model, tmp_path, happen):
    def spoil_gradient(executor: Any) -> None:
        executor.state.grad_BTD = executor.state.grad_BTD * float("inf")

    happen(1, "^BACKWARD 2 mb=1", spoil_gradient, times=2)
    config = make_config(model, tmp_path, max_steps=2)
    finetune(config)
    (event,) = events(config)
    assert event["op"].startswith("BACKWARD 2 mb=1")


def test_with_stop_the_first_one_ends_the_run(model, tmp_path, happen):
    happen(3, "^FORWARD 1 mb=0", spoil(float("nan")), times=2)
    config = make_config(model, tmp_path, max_steps=4, n_rows=15, on_nan="stop")
    with pytest.raises(RunError, match="not finite first at FORWARD 1") as caught:
        finetune(config)
    assert f"{CHECKPOINTS}/step-000002" in str(caught.value)
    assert not (Path(config.output) / ADAPTER_NAME).exists()


def test_too_many_in_a_row_end_the_run_and_no_adapter_is_saved(model, tmp_path):
    """A learning rate that ruins the adapter in its first update: nothing after it is finite."""
    settings = {"lr": 1e30, "schedule": "constant", "warmup_ratio": 0.0, "clip": 0.0}
    config = make_config(model, tmp_path, max_steps=9, max_skipped=2, **settings)
    with pytest.raises(RunError, match=r"2 batches before it were skipped in a row|not finite"):
        finetune(config)
    assert not (Path(config.output) / ADAPTER_NAME).exists()
    for folder in (Path(config.output) / CHECKPOINTS).glob("*"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(folder / ADAPTER_NAME).values())


def test_after_early_updates_the_step_is_skipped_from_the_last_checkpoint(model, tmp_path, happen):
    settings = {"apply": "segment", "n_rows": 15, "max_steps": 4, "save_every": 1}
    happen(3, "^FORWARD 2 mb=1", spoil(float("nan")))  # the first segment has been updated by then
    config = make_config(model, tmp_path, **settings)
    finetune(config)
    lines = log(config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "skipped" in lines[2]


@pytest.mark.parametrize(
    ("settings", "on_nan"),
    [({"boundary_update": "fresh"}, "skip"), ({"apply": "segment", "optimizer_states": "disk"}, "stop")],
)
def test_an_overflow_after_an_early_update_costs_no_step(model, tmp_path, monkeypatch, settings, on_nan):
    """As in float16: the task's gradients overflow at first, those of the local loss, with next to no weight, do not.
    A loss scale is a power of two, so the run that goes back and lowers it is the run without one, bit for bit.
    """
    settings = {**settings, "local_weight": 1e-12, "max_steps": 3, "on_nan": on_nan}
    plain = make_config(model, tmp_path, output="plain", **settings)
    finetune(plain)
    build = loaded.build_executor

    def scaled(*arguments: Any, **options: Any) -> Any:
        executor, shape = build(*arguments, **options)
        executor.loss_scale = 2.0**113  # halved some six times
        return executor, shape

    monkeypatch.setattr(loaded, "build_executor", scaled)
    config, listener = make_config(model, tmp_path, **settings), Listener()
    finetune(config, listener)
    assert adapter(config) == adapter(plain)
    assert all("loss" in line for line in log(config))
    assert {event["event"] for event in events(config)} == {"overflow"}
    assert any("gradients overflowed" in text for text in listener.warnings)


def test_a_loss_far_above_its_running_level_is_told():
    level = LossLevel()
    assert not any(level.add(2.0 + 0.1 * (-1) ** i) for i in range(LEVEL_STEPS + 10))
    assert not level.add(2.3)
    assert level.add(4.0)
    falling = LossLevel()
    assert not any(falling.add(8.0 * 0.98**i) for i in range(300))


def test_a_rise_is_reported_in_the_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr("lopt_edge.training.checkpoint.run_state.LEVEL_STEPS", 1)
    for name in ("FAR_SHARE", "FAR_DEVIATIONS"):
        monkeypatch.setattr(f"lopt_edge.training.checkpoint.run_state.{name}", -1e9)
    config, listener = make_config(model, tmp_path, max_steps=3), Listener()
    finetune(config, listener)
    assert any("far above its running level" in text for text in listener.warnings)
    assert {event["event"] for event in events(config)} == {"loss rose"}
