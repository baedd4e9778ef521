"""A disk that fails at one write or read of a run, each in turn: nothing is damaged, and the run goes on or can be resumed.

The run writes checkpoints, page files, logs, the 4-bit copy and the result. By default one point of each kind of file and
call fails in one way; `-m long` lets every point fail in every way. After each fault:
- the run ended well, or with an error of ours that names a path below the run's folders; no traceback, no hang
- the training data and the model are as they were
- the newest whole checkpoint is one that the run had made, and no page file, lock or half-written folder is left
- resumed on a sound disk, the run ends in the bytes of the undisturbed one, adapter and log
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lopt_edge import finetune
from lopt_edge.config.settings import Config
from lopt_edge.errors import LoptError, RunError
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, latest
from lopt_edge.training.session.progress import Progress
from tests.training.fault_points import FAULTS, Point, Points
from tools.tiny_runs import log_of, make_config, make_model

PAGED = {"weights": "disk", "activations": "page", "saved_inputs": "disk", "optimizer_states": "disk", "gradients": "disk"}
STRIDE = int(os.environ.get("LOPT_FAULT_STRIDE", "1"))  # of the long run: every point takes half an hour on two cores
SLOW_STRIDE = {"full": 1, "broken": 1, "short": 1, "slow": 20}  # a slow disk is one that waits; it changes no path
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds files by their descriptors in /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


class Scene:
    """One run in one folder, again and again."""

    def __init__(self, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = make_config(model, root, n_rows=8, max_steps=2, save_every=1, cache_dir=str(root / "cache"), **PAGED)
        self.root, self.model, self.output = root, model, Path(self.config.output)
        finetune(self.config)
        self.whole = self.result()
        self.unchanged = self.fingerprint()
        self.points = Points(root, monkeypatch)
        self.clear()
        self.found = self.points.count(self.run)

    def run(self, config: Config | None = None) -> LoptError | None:
        try:
            finetune(config or self.config)
        except LoptError as error:
            return error
        return None

    def result(self) -> tuple[bytes, list[dict[str, Any]]]:
        return (self.output / ADAPTER_NAME).read_bytes(), log_of(self.config)

    def clear(self) -> None:
        for name in ("out", "cache"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(Path(self.config.data).read_bytes())
        for path in sorted(self.model.iterdir()):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def withstands(self, point: Point, fault: str) -> None:
        self.clear()
        error: Any = self.points.fail(point, fault, self.run)
        if error is not None:
            assert fault != "slow"
            assert str(self.root) in str(error) or point.kind == "cache", error
        else:
            assert self.result() == self.whole
        assert self.fingerprint() == self.unchanged
        left = [path for path in self.root.rglob("*") if path.name.startswith((".writing-", "lopt-pages", ".lock"))]
        assert not left and not Path(f"{self.output}.pages").exists()
        _, faults = latest(self.output / CHECKPOINTS)
        assert faults == []
        assert self.run(self.config.model_copy(update={"resume": "auto"})) is None
        assert self.result() == self.whole


def chosen(points: list[Point]) -> Iterator[Point]:
    """A middle one of each kind of file and call."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.kind, point.call), []).append(point)
    for group in groups.values():
        yield group[len(group) // 2]


@pytest.fixture(scope="module")
def scene(model, tmp_path_factory) -> Iterator[Scene]:
    """The run, counted once: each fault clears what the one before left."""
    with pytest.MonkeyPatch.context() as patch:
        yield Scene(model, tmp_path_factory.mktemp("scene"), patch)


def test_there_are_points_of_every_kind(scene):
    found = {(point.kind, point.call) for point in scene.found}
    assert found >= {
        ("checkpoint", "write"),
        ("checkpoint", "fsync"),
        ("checkpoint", "rename"),
        ("pages", "pwrite"),
        ("pages", "preadv"),
        ("pages", "posix_fallocate"),
        ("cache", "write"),
        ("cache", "preadv"),
        ("log", "write"),
        ("log", "fsync"),
        ("result", "write"),
        ("result", "replace"),
    }


@pytest.mark.parametrize("kind", ["checkpoint", "pages", "cache", "log", "result"])
def test_a_fault_in_the_middle(scene, kind):
    seen = 0
    for number, point in enumerate(point for point in chosen(scene.found) if point.kind == kind):
        faults = [fault for fault in FAULTS if point.can(fault)]
        scene.withstands(point, faults[number % len(faults)])
        seen += 1
    assert seen >= 2, [point for point in scene.found if point.kind == kind]


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_point(scene, fault):
    points = [point for point in scene.found if point.can(fault)][FAULTS.index(fault) :: STRIDE * SLOW_STRIDE[fault]]
    for point in points:
        scene.withstands(point, fault)
    print(f"withstood: {fault} at {len(points)} of {len(scene.found)} points")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 6 MiB, where the machine allows one."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Ballast(Progress):
    """Fills the disk after step 2, and frees it on demand."""

    def __init__(self, folder: Path) -> None:
        self.file, self.warnings = folder / "ballast", []

    def step(self, metrics: Any) -> None:
        if metrics["step"] == 2:
            free = shutil.disk_usage(self.file.parent).free
            with self.file.open("wb") as file:
                file.write(bytes(max(0, free - 40_000)))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_real_full_disk(model, tmp_path, small_disk):
    """The checkpoint of step 2 is not written, training goes on, the end fails for want of space; then there is room."""
    config = make_config(
        model, tmp_path, output="small/out", n_rows=16, max_steps=4, save_every=1, page_dir=str(tmp_path / "pages")
    )
    ballast = Ballast(small_disk)
    with pytest.raises(LoptError, match="No space left"):
        finetune(config, ballast)
    assert any("Training goes on" in text and "free space" in text for text in ballast.warnings)
    found, faults = latest(Path(config.output) / CHECKPOINTS)
    assert found is not None and found.folder.name == "step-000001" and faults == []
    ballast.file.unlink()
    whole = make_config(model, tmp_path, output="whole", n_rows=16, max_steps=4)
    finetune(whole)
    finetune(config.model_copy(update={"resume": "auto"}))
    assert (Path(config.output) / ADAPTER_NAME).read_bytes() == (Path(whole.output) / ADAPTER_NAME).read_bytes()


def test_too_little_space_is_told_before_the_run(model, tmp_path, small_disk):
    (small_disk / "ballast").write_bytes(bytes(6_000_000))
    config = make_config(model, tmp_path, output="small/out", max_steps=2)
    with pytest.raises(LoptError, match=r"checkpoints need up to .* are free there"):
        finetune(config)
    assert not list((small_disk / "out").glob("*.safetensors"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(model, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(LoptError, match="cannot be written"):
        finetune(make_config(model, tmp_path, output="locked/out"))


@pytest.mark.parametrize("act", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("elsewhere"))])
def test_a_folder_that_vanishes_under_way(model, tmp_path, act):
    """The output folder is removed or moved in the middle: told, with the path; the adapter is saved, the data stays."""

    class Remove(Progress):
        def step(self, metrics: Any) -> None:
            if metrics["step"] == 2:
                act(tmp_path / "out")

    config = make_config(model, tmp_path, n_rows=16, max_steps=4, save_every=1)
    with pytest.raises(RunError, match="removed or moved while the run went on") as caught:
        finetune(config, Remove())
    assert caught.value.exit_code == 1 and str(tmp_path / "out") in str(caught.value)
    (saved,) = (tmp_path / "out").glob("adapter-step-*")
    assert (saved / ADAPTER_NAME).exists() and str(saved) in str(caught.value)
    assert Path(config.data).exists() and not (tmp_path / "out" / "run.json").exists()
