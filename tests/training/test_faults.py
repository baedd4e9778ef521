"""Faults of a run under way: a message that says where and what to do, nothing left behind, the last step kept.

Files are truncated for real; what no test can break (a full disk, a driver that refuses to pin) is refused in the system
call. `before_op` sets a fault off just before an op of the plan. What must hold after each is written once, in `Scene`.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lopt_edge import finetune
from lopt_edge.config.settings import Config
from lopt_edge.errors import RunError
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.plan.schedule.ops import Op
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, name_of, read
from lopt_edge.training.prepare.tiers import JOURNAL_NAME, PAGES_NAME
from lopt_edge.training.session import loaded
from lopt_edge.training.session.progress import Progress
from tools.tiny_runs import make_config, make_model

PAGED = {
    "weights": "disk",
    "activations": "page,0=recompute,2=recompute",
    "saved_inputs": "disk",
    "optimizer_states": "disk",
    "gradients": "disk",
}
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
        build, left = loaded.build_executor, [act]

        def with_fault(*arguments: Any, **options: Any) -> Any:
            executor, shape = build(*arguments, **options)

            def faulty(method: Callable[[Any, Op], None]) -> Callable[[Any, Op], None]:
                def call(state: Any, op: Op) -> None:
                    if left and executor.model.clock.step == step and re.search(pattern, op.text()):
                        left.pop()()
                    method(state, op)

                return call

            # not by `observe`, which the run itself uses in its first steps
            executor.methods = {kind: faulty(method) for kind, method in executor.methods.items()}
            return executor, shape

        monkeypatch.setattr(loaded, "build_executor", with_fault)

    return arrange


def open_files() -> list[str]:
    """What the descriptors of this process lead to; a directory that is being listed is left out, and so is what an earlier
    test has let go but the collector has not."""
    gc.collect()
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return sorted(found)


def page_descriptor(of: str) -> int:
    """A nameless page file's descriptor, as anybody else would find it."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if re.search(rf"/lopt-pages-\d+-{of}\.bin", os.readlink(f"/proc/self/fd/{name}")):
                return int(name)
        except FileNotFoundError:
            continue
    raise AssertionError(f"no page file of {of} is open")


def cut_pages() -> None:
    os.ftruncate(page_descriptor(PAGES_NAME), 0)


def cut_journal() -> None:
    os.ftruncate(page_descriptor(JOURNAL_NAME), 0)


def cut_both() -> None:
    cut_pages()
    cut_journal()


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

    def fails(
        self,
        config: Config,
        progress: Progress | None = None,
        *,
        steps: int,
        says: str,
        lost: bool = False,
        moments_lost: bool = False,
    ) -> str:
        """Run it: the message, after the checks. `steps` have finished; `lost`: their state cannot be had back;
        `moments_lost`: all but the adapter cannot."""
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
        kept = sorted(path.name for path in (output / CHECKPOINTS).glob("*"))
        if lost or not steps:
            assert kept == [] and CHECKPOINTS not in text
            assert not lost or "between two steps" in text
            return text
        if moments_lost:
            assert kept == []
            folder = output / f"adapter-{name_of(steps)}"
        else:
            assert kept == [name_of(steps)]
            folder = output / CHECKPOINTS / kept[0]
            assert "lopt-edge resume" in text and read(folder).state["run"]["steps"] == steps
        assert str(folder) in text
        assert (folder / ADAPTER_NAME).read_bytes() == self.adapter_after(steps)
        return text

    def goes_on(self, config: Config) -> None:
        """Resumed, it ends as if nothing had been."""
        assert finetune(config.model_copy(update={"resume": "auto"})).steps == 4
        assert (Path(config.output) / ADAPTER_NAME).read_bytes() == self.adapter_after(4)


@pytest.fixture
def scene(four_bit_model, adapter_after, tmp_path) -> Scene:
    return Scene(four_bit_model, tmp_path, adapter_after)


def refuse(number: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


# The order of the updates is layer 0, layer 1, aux 0, layer 2, layer 3.
@on_linux
@pytest.mark.parametrize(
    "op", ["RESTORE 2", "LOAD gradients", "STEP layer 0", "STEP layer 1", "STEP layer 2", "STEP layer 3"]
)
def test_a_page_file_truncated_under_way(scene, before_op, op):
    """Also between two updates of a step: what undoes them lies in another file."""
    before_op(3, f"^{op}", cut_pages)
    scene.fails(scene.config(**PAGED), steps=2, says="truncated", moments_lost=True)


@on_linux
@pytest.mark.parametrize(("op", "says"), [("STEP aux 0", "undo copies.*journal.*truncated"), ("STEP layer 3", "truncated")])
def test_a_journal_truncated_between_two_updates(scene, before_op, op, says):
    """These updates cannot be undone any more, so the step is finished; the next one does not begin without a journal."""
    before_op(3, f"^{op}", cut_journal)
    scene.fails(scene.config(**PAGED), steps=3, says=says)


@on_linux
def test_a_journal_truncated_before_the_first_update(scene, before_op):
    before_op(3, "^FORWARD 0", cut_journal)
    scene.fails(scene.config(**PAGED), steps=2, says="journal.*truncated")


@on_linux
def test_a_journal_truncated_in_the_last_step_costs_nothing(scene, before_op, adapter_after):
    before_op(4, "^STEP aux 0", cut_journal)
    config = scene.config(**PAGED)
    assert finetune(config).steps == 4
    assert (Path(config.output) / ADAPTER_NAME).read_bytes() == adapter_after(4)


@on_linux
def test_both_page_files_truncated_between_two_updates(scene, before_op):
    """Then the step's beginning is lost, and the message says so."""
    before_op(3, "^STEP layer 2", cut_both)
    scene.fails(scene.config(**PAGED), steps=2, says="truncated", lost=True)


@on_linux
def test_a_full_page_folder_under_way(scene, before_op, monkeypatch):
    before_op(2, "^SPILL", lambda: monkeypatch.setattr(os, "pwrite", refuse(errno.ENOSPC)))
    scene.fails(scene.config(**PAGED), steps=1, says="No space left|no space|full|free some")


@on_linux
def test_a_full_page_folder_at_the_start(scene, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    scene.fails(scene.config(**PAGED), steps=0, says="free some space")


@on_linux
def test_a_model_file_that_shrinks_while_it_streams(scene, before_op):
    folder = scene.root / "model"
    shutil.copytree(scene.model, folder)
    shard = next(folder.glob("*.safetensors"))
    before_op(2, "^FETCH layer 3", lambda: os.truncate(shard, shard.stat().st_size // 2))
    scene.model = folder
    scene.fails(scene.config(weights="disk"), steps=1, says="truncated|ends inside")


@on_linux
def test_with_a_checkpoint_from_before_a_truncated_page_file_costs_one_step(scene, before_op):
    before_op(3, "^LOAD gradients", cut_pages)
    config = scene.config(**PAGED, save_every=1)
    with pytest.raises(RunError, match=r"step-000002.*lopt-edge resume"):
        finetune(config)
    scene.goes_on(config)


@pytest.mark.long
@on_linux
def test_five_hundred_steps_do_not_grow(scene):
    """Resident set, page file, threads and descriptors after step 50 and after step 500, everything paged."""
    from lopt_edge.system.memory import resident_bytes

    seen: dict[int, tuple[int, int, int]] = {}

    class Watch(Progress):
        def step(self, metrics: Any) -> None:
            if metrics["step"] in (50, 500):
                disk = metrics["peak_disk_bytes"]
                seen[metrics["step"]] = (resident_bytes(), disk, threading.active_count() + len(open_files()))

    config = scene.config(**{**PAGED, "max_steps": 500, "n_rows": 60})
    assert finetune(config, Watch()) is not None
    early, late = seen[50], seen[500]
    print(seen)
    assert late[0] <= early[0] * 1.01
    assert late[1] <= early[1] * 1.01
    assert late[2] == early[2]
