"""SIGINT, SIGTERM and SIGHUP in every phase, through the command line: exit code 128 and the number, advice, nothing lost.

The signal is sent to this process from inside the phase, so it lands there and nowhere else. The second signal, which ends
the process at once, is sent to a child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lopt_edge import finetune
from lopt_edge.adapters import merge as merging
from lopt_edge.cli.main import main
from lopt_edge.errors import Interrupted
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.run.step import evaluation as evaluating
from lopt_edge.run.step.executor import Executor
from lopt_edge.system.signals import Interrupts
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, latest
from lopt_edge.training.prepare import read as preparation
from lopt_edge.training.session import loaded, saving, session
from tools.tiny_runs import make_config, make_model

pytestmark = pytest.mark.usefixtures("warm_children")

PHASES: dict[str, tuple[Any, str, str]] = {
    "reading": (preparation, "load_dataset", "interrupted by"),
    "quantising": (loaded, "four_bit_folder", "nothing was trained yet; go on with: lopt-edge resume"),
    "loading": (loaded, "load_model", "nothing was trained yet; go on with: lopt-edge resume"),
    "evaluating": (evaluating, "held_out_loss", "no step was finished yet; begin again with: lopt-edge resume"),
    "training": (Executor, "run", "step-000000+2; go on with: lopt-edge resume"),
    "writing a checkpoint": (saving, "write_snapshot", "step-000002; go on with: lopt-edge resume"),
    "saving": (session, "save_adapter", "the newest checkpoint is step-000004; go on with: lopt-edge resume"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> bytes:
    config = settings(model, tmp_path_factory.mktemp("whole"))
    finetune(config)
    return (Path(config.output) / ADAPTER_NAME).read_bytes()


def settings(model: Path, root: Path, **changes: Any):
    return make_config(model, root, n_rows=18, max_steps=4, save_every=2, eval_fraction=0.1, **changes)


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lopt-edge", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def sending(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, with a signal to this process at its beginning, once."""
    left = [number]

    def call(*arguments: Any, **options: Any) -> Any:
        if left:
            os.kill(os.getpid(), left.pop())
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("phase", PHASES)
def test_every_phase(model, whole, tmp_path, monkeypatch, capsys, phase, number):
    if number is not signal.SIGTERM and phase not in ("loading", "training"):
        pytest.skip("the signals differ in their number only")
    config = settings(model, tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    owner, name, says = PHASES[phase]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, sending(number, real))
    before = signal.getsignal(number)
    assert command(monkeypatch, "finetune", str(file)) == 128 + number
    assert signal.getsignal(number) is before
    monkeypatch.setattr(owner, name, real)
    told = " ".join(capsys.readouterr().err.split())
    assert f"interrupted by {signal.Signals(number).name}" in told and says in told, told
    output = Path(config.output)
    assert not list(output.rglob(".writing-*")) and not list(output.rglob("*.partial*")) and not (output / ".lock").exists()
    if phase == "reading":  # nothing is written before all checks passed
        assert not output.exists()
        return
    assert command(monkeypatch, "resume", str(output)) == 0
    assert (output / ADAPTER_NAME).read_bytes() == whole


def test_a_hangup_counts_once_and_nohup_is_respected():
    """A terminal that closes sends it by the kernel and by the shell; after nohup it is ignored from the start."""
    interrupts = Interrupts()
    with interrupts.listening(), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
    assert caught.value.exit_code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_export(model, tmp_path, monkeypatch, capsys):
    config = settings(model, tmp_path)
    finetune(config)
    monkeypatch.setattr(merging, "write_sharded", sending(signal.SIGTERM, merging.write_sharded))
    assert command(monkeypatch, "export", config.output, "--merged", str(tmp_path / "merged")) == 143
    assert "interrupted by SIGTERM" in capsys.readouterr().err
    assert not list(tmp_path.glob("merged*"))


CHILD = """
import os, signal, sys, time
from lopt_edge.training.session import loaded, saving, session
from lopt_edge.cli.main import main
real = saving.write_snapshot
def slow(folder, *arguments, **options):
    real(folder, *arguments, **options)
    if "step-000004" in str(folder):
        print("writing", flush=True)
        time.sleep(60)
saving.write_snapshot = slow
sys.argv = ["lopt-edge", "finetune", sys.argv[1]]
main()
"""


def test_the_second_signal_ends_it_at_once_and_the_last_checkpoint_is_whole(model, whole, tmp_path, monkeypatch):
    config = settings(model, tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as here: another number of threads gives other bits
    )
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    started = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=120) == 143
    assert time.monotonic() - started < 10
    assert "once more ends it at once" in " ".join(child.stderr.read().split())
    found, _ = latest(Path(config.output) / CHECKPOINTS)
    assert found is not None and found.folder.name == "step-000002"
    assert command(monkeypatch, "resume", config.output) == 0
    assert (Path(config.output) / ADAPTER_NAME).read_bytes() == whole
