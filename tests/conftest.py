"""Fixtures: tiny model folders (made once a session), the command line in this process, and a stop in the middle of a step.

Torch is imported where it is needed: pytest-xdist's main process reads this file too, and runs no test.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side (pytest-xdist) and must not depend on the number of cores
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest

from tests import warm

hypothesis.settings.register_profile("ours", deadline=None)  # a busy machine gives no seconds
hypothesis.settings.load_profile("ours")
_n_modules = 0  # that were there when the garbage collector's objects were last put aside
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, by the tests' children as well


@pytest.fixture(scope="session")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, dtype, **config changes) -> a 4-bit folder of a tiny random model, made once."""
    import torch

    from lopt_edge.models.folder import find_model
    from lopt_edge.models.four_bit import four_bit_folder
    from tools.tiny_models import make_folder

    made: dict[str, Path] = {}

    def get(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        key = f"{family} {dtype} {sorted(changes.items())}"
        if key not in made:
            root = tmp_path_factory.mktemp("model")
            source = make_folder(root / "source", family, dtype=dtype, **changes)
            made[key], _ = four_bit_folder(find_model(str(source)), cache_dir=str(root / "cache"))
        return made[key]

    return get


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No power fails in a test, so nothing waits until the disk has a file: a run syncs fifty. What would be lost is
    tested by what is called (tests/training/crash_disk.py). Processes that tests start do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which a closed file refuses, too
        yield


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """A run collects garbage three times; of what earlier modules left alive none needs to be looked at again. In a worker
    that has run 1,000 tests a collection took over a second, and half of the suite's time went into it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quick_collections_after_imports() -> None:
    """The same once a test has imported a library: its objects are most of what a collection looks at, 0.3 s each time."""
    global _n_modules
    if len(sys.modules) > _n_modules + 50:
        _n_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `lopt-edge WORD ...` in this process; a traceback fails the test."""
    from lopt_edge.cli import main as cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["lopt-edge", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return int(end.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def warm_children() -> Iterator[None]:
    """The processes that a module starts with Python code, or that ours start for it, begin warm (tests/warm.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", warm.Popen)
        yield


@pytest.fixture
def stop_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """(step, micro-batch): SIGTERM to this process while that micro-batch of that step runs, once."""
    from lopt_edge.plan.schedule.effects import Kind
    from lopt_edge.training.session import loaded

    left: list[tuple[int, int]] = []
    build = loaded.build_executor

    def build_with_stop(*arguments: Any, **options: Any) -> Any:
        executor, shape = build(*arguments, **options)
        embed = executor.methods[Kind.EMBED]

        def call(state: Any, op: Any) -> None:
            if left and left[0] == (executor.model.clock.step, op.micro_batch):
                left.pop()
                os.kill(os.getpid(), signal.SIGTERM)
            embed(state, op)

        executor.methods = {**executor.methods, Kind.EMBED: call}
        return executor, shape

    monkeypatch.setattr(loaded, "build_executor", build_with_stop)
    return lambda step, micro_batch: left.append((step, micro_batch))
