"""Faults of a run under way: a message that says where and what to do, exit code 1, nothing left behind, the last step kept.

Files are truncated, removed and filled for real, and the system refuses memory for real; what no test can break (a disk that
reports an error, a driver that refuses to pin) is refused in the system call. Faults are set off between two steps, or by
`before_op` just before an op of the plan. What must hold after each of them is written once, in `Scene`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lopt_edge import finetune, training
from lopt_edge.config import Config
from lopt_edge.errors import RunError
from lopt_edge.models import find_model, four_bit_folder
from lopt_edge.plan.ops import Op
from lopt_edge.progress import Progress
from lopt_edge.run.load import load_model
from lopt_edge.run.lora import ADAPTER_NAME, adapter_tensors, load_adapters
from tests.runs import make_config, make_model, write_rows

PAGED = {"weights": "disk", "activations": "page,0=recompute,2=recompute", "saved_inputs": "disk",
         "optimizer_states": "disk", "gradients": "disk"}  # fmt: skip
STEADY = {"max_steps": 4, "schedule": "constant", "warmup_ratio": 0.0}  # so that N steps of any run are the same steps
Act = Callable[[], object]
on_linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for its descriptors in /proc")


@pytest.fixture(scope="module")
def four_bit_model(tmp_path_factory) -> Path:
    """A 4-bit model folder with a tokenizer: used as it is, so that a test may break a copy of it."""
    root = tmp_path_factory.mktemp("model")
    return four_bit_folder(find_model(str(make_model(root / "tiny"))), cache_dir=str(root / "cache"))[0]


@pytest.fixture(scope="module")
def adapter_after(four_bit_model, tmp_path_factory) -> Callable[[int], bytes]:
    """The adapter file that an undisturbed run of so many steps saves, everything resident."""
    made: dict[int, bytes] = {}

    def get(n_steps: int) -> bytes:
        if n_steps not in made:
            root = tmp_path_factory.mktemp("whole")
            config = make_config(four_bit_model, root, **{**STEADY, "max_steps": n_steps})
            finetune(config)
            made[n_steps] = (Path(config.output) / ADAPTER_NAME).read_bytes()
        return made[n_steps]

    return get


class AfterStep(Progress):
    """Does something between two steps."""

    def __init__(self, step: int, act: Act) -> None:
        self.at, self.act, self.warnings = step, act, []

    def step(self, metrics: Any) -> None:
        if metrics["step"] == self.at:
            self.act()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def before_op(monkeypatch) -> Callable[[int, str, Act], None]:
    """(step, pattern, act): `act` is called once, before the step's first op whose text matches the pattern."""

    def arrange(step: int, pattern: str, act: Act) -> None:
        build, left = training.build_executor, [act]

        def with_fault(*arguments: Any) -> Any:
            executor, shape = build(*arguments)

            def observe(op: Op, after: bool) -> None:
                if not after and left and executor.model.clock.step == step and re.search(pattern, op.text()):
                    left.pop()()

            executor.observe = observe
            return executor, shape

        monkeypatch.setattr(training, "build_executor", with_fault)

    return arrange


def open_files() -> list[str]:
    """What the descriptors of this process lead to; a directory that is being listed is left out."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return sorted(found)


def page_descriptor() -> int:
    """The nameless page file's descriptor, as anybody else would find it."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if "/lopt-pages-" in os.readlink(f"/proc/self/fd/{name}"):
                return int(name)
        except FileNotFoundError:
            continue
    raise AssertionError("no page file is open")


def cut_page_file() -> None:
    os.ftruncate(page_descriptor(), 0)


def data_limit() -> object:
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)


@dataclass
class Scene:
    """A run that is to fail, and what must hold afterwards."""

    model: Path
    root: Path
    adapter_after: Callable[[int], bytes]
    found: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> Config:
        return make_config(self.model, self.root, **{**STEADY, **changes})

    def fails(self, config: Config, progress: Progress | None = None, *, steps: int, says: str, lost: bool = False) -> str:
        """Run it: the message, after the checks. `steps` have finished; `lost`: their state cannot be had back."""
        before = {"threads": set(threading.enumerate()), "files": open_files(), "limit": data_limit()}
        with pytest.raises(RunError) as caught:
            finetune(config, progress)
        text = str(caught.value)
        assert re.search(says, text, re.DOTALL), text
        assert caught.value.exit_code == 1
        assert "-> " in text, f"no advice in: {text}"
        assert set(threading.enumerate()) <= before["threads"]
        assert open_files() == before["files"]
        assert data_limit() == before["limit"]
        output = Path(config.output)
        assert not list(self.root.rglob("lopt-pages-*")) and not Path(f"{output}.pages").exists()
        assert not list(output.rglob("*.partial"))
        kept = sorted(path.name for path in output.glob("step-*"))
        if lost or not steps:
            assert kept == [] and "step-" not in text
            assert not lost or "between two steps" in text
            return text
        assert kept == [f"step-{steps}"]
        folder = output / kept[0]
        assert str(folder) in text
        assert (folder / ADAPTER_NAME).read_bytes() == self.adapter_after(steps)
        self.loads(folder)
        return text

    def loads(self, folder: Path) -> None:
        source = find_model(str(self.adapter_after.__closure__ and self.model))
        del source
        model = load_model(self.intact, self.facts, device=torch.device("cpu"), dtype=torch.float32)
        load_adapters(model, folder)
        saved = load_file(folder / ADAPTER_NAME)
        ours = adapter_tensors(model)
        assert set(saved) == set(ours) and all(torch.equal(saved[name], ours[name]) for name in saved)
