"""Budgets through the command line: what is picked, what is kept to, what is refused; and that the result never changes.

Runs whose memory is judged are real child processes. The kernel's own count of a child (ru_maxrss) begins with the memory
of the process that forked it, so a small launcher stands between. What is only refused runs in this process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lopt_edge import finetune
from lopt_edge.cli import main as cli
from lopt_edge.errors import DoesNotFit, InputError
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.system.file_systems import memory_file_system
from lopt_edge.training.prepare.read import read_inputs
from tools.tiny_runs import make_config, metrics_of

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"
MIB = 1 << 20
LAUNCH = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-c", "from lopt_edge.cli.main import main; main()", *sys.argv[1:]]).returncode
print("maxrss", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
SHARED_MEMORY = Path("/dev/shm")
needs_tmpfs = pytest.mark.skipif(
    not SHARED_MEMORY.is_dir() or memory_file_system(SHARED_MEMORY) is None, reason="needs a folder in memory"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = (ROOT / "examples" / "data" / "docstrings-train.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(rows[:24]))
    return path


def words(data: Path, root: Path, name: str, *more: object) -> list[str]:
    """`finetune` in two quick steps, large ones and of a high rank, so that a step takes more than saving does.

    A budget may decide whether sequences are packed, which changes bits: here none are."""
    found = ["finetune", "--model", TINY, "--data", data, "--output", root / name, "--cache-dir", root / "cache",
             "--max-seq-len", 256, "--max-steps", 2, "--batch-size", 12, "--grad-accum", 1, "--lora-r", 64,
             "--device", "cpu", "--compute-dtype", "float32", "--no-packing", "--verbose", *more]  # fmt: skip
    return [str(word) for word in found]


@dataclass
class Child:
    """A finished child process, and what it left."""

    code: int
    stderr: str
    max_rss_bytes: int
    output: Path

    @property
    def run(self) -> dict[str, Any]:
        return json.loads((self.output / "run.json").read_text())

    @property
    def losses(self) -> list[tuple[Any, ...]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [tuple(json.loads(line)[key] for key in ("loss", "local_loss", "grad_norm")) for line in lines]

    @property
    def picked(self) -> str:
        """The printed line with the settings and why."""
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("memory: ")]
        return line


def run_child(data: Path, root: Path, name: str, *more: object) -> Child:
    command = [sys.executable, "-c", LAUNCH, *words(data, root, name, *more)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return Child(done.returncode, done.stderr, int(done.stdout.split()[-1]) * 1024, root / name)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """(exit code, stderr) of `finetune` with these flags; flags that are given again replace the earlier ones.

    The libraries' bytes are those of a process of its own: this one has run other tests before.
    """
    monkeypatch.setattr("lopt_edge.planning.from_data.library_bytes", lambda source: 350 * MIB)

    def call(*more: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["lopt-edge", *words(data, tmp_path, "out", *more)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return int(end.value.code or 0), text

    return call


def predicted(text: str) -> int:
    """Bytes of the predicted peak, or of the smallest setting where 50 MB are too little even for that."""
    found = re.search(r"device (?:memory: )?(\d+) MiB (?:of|at|needed, 48 MiB allowed)", text)
    assert found, text
    return int(found[1]) * MIB


@pytest.mark.parametrize("shares", [(0.0,), pytest.param((0.0, 0.25), marks=pytest.mark.long)])
def test_every_budget_gives_the_same_run_and_is_kept(data, tmp_path, run, shares):
    """From the smallest peak that can be predicted to that of the defaults: other settings, the same losses and adapter."""
    _, (_, text), (code, refusal) = run("--dry-run"), run("--dry-run"), run("--device-memory", "50MB")
    assert code == DoesNotFit.exit_code
    resident, distance = predicted(text), predicted(text) - predicted(refusal)
    assert distance > 8 * MIB, "nothing lies between: this test proves nothing"
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()

    code, text = run()
    free = Child(code, text, 0, tmp_path / "out")
    (copy,) = (tmp_path / "cache").iterdir()
    cache_bytes = free.run["quantised_cache_bytes"]
    assert cache_bytes == sum(path.stat().st_size for path in copy.iterdir())
    assert f"{cache_bytes / MIB:.0f} MiB of disk, apart from page files" in text

    def run_within(n_bytes: int) -> Child:
        child = run_child(data, tmp_path, f"run-{n_bytes}", "--device-memory", f"{n_bytes}B")
        assert child.code == 0, child.stderr
        assert child.picked in child.run["reasons"]
        assert child.run["predicted"]["device_bytes"] <= n_bytes
        assert child.max_rss_bytes <= n_bytes and child.run["peaks"]["peak_rss_bytes"] <= n_bytes
        assert child.losses == free.losses
        assert (child.output / ADAPTER_NAME).read_bytes() == (free.output / ADAPTER_NAME).read_bytes()
        assert not Path(f"{child.output}.pages").exists()
        return child

    large = run_within(resident + 32 * MIB)  # the child's libraries may take that much more
    margin = 3 * MIB  # what libraries take wavers a little from process to process, and messages are rounded
    smallest = large.run["predicted"]["device_bytes"] - distance + margin
    picked = {run_within(smallest + round(share * distance)).picked for share in shares}
    assert len(picked | {large.picked}) == 1 + len(shares), picked
    assert all("disk" in line for line in picked) and "disk" not in large.picked


# what is refused, in this process --------------------------------------------------------------------------------------


@pytest.fixture
def refuses(run: Callable[..., tuple[int, str]], tmp_path: Path) -> Callable[..., str]:
    """The message of a refusal: advice, and nothing written. `code`: bad input, unless it is only that nothing fits."""

    def call(*more: object, code: int = InputError.exit_code) -> str:
        before = sorted(tmp_path.rglob("*"))
        found, text = run(*more)
        assert found == code, text
        assert "-> " in text
        assert sorted(tmp_path.rglob("*")) == before
        return text

    return call


@pytest.mark.parametrize("amount", ["24", "0GB", "-5GB", "12XB", "much", "0%", "101%"])
def test_bad_amounts_are_told_together(refuses, amount):
    text = refuses("--device-memory", amount, "--disk-memory", "7QB")
    assert "--device-memory: " in text and "--disk-memory: " in text
    assert repr(amount) in text and "'7QB'" in text


def test_percentages_are_of_what_is_free(run):
    code, text = run("--device-memory", "90%", "--disk-memory", "50 %", "--dry-run")
    assert code == 0, text
    assert re.search(r"device \d+ MiB", text)


@pytest.mark.parametrize("flag", ["--host-memory", "--pinned-memory"])
def test_there_is_no_host_tier_on_a_cpu(refuses, flag):
    text = refuses(flag, "1GB")
    assert "no host tier" in text and "--device-memory" in text


@pytest.mark.parametrize("n_bytes", ["1MB", "1%"])
def test_too_little_device_memory(refuses, n_bytes, monkeypatch):
    monkeypatch.setattr("lopt_edge.run.devices.host.available_bytes", lambda: 10**9)
    assert re.search(r"device memory: \d+ MiB needed", refuses("--device-memory", n_bytes, code=DoesNotFit.exit_code))


def test_too_little_disk_for_what_must_be_there(refuses):
    text = refuses("--optimizer-states", "disk", "--disk-memory", "1MB", code=DoesNotFit.exit_code)
    assert re.search(r"disk memory: \d+ MiB needed, 1,?000,?000 bytes allowed", text), text


def test_page_files_stay_within_the_disk_budget_that_was_predicted(tmp_path):
    """Not a byte more is allowed than what the plan is said to need: whole blocks and gaps are part of that."""
    knobs = {
        "optimizer_states": "disk",
        "gradients": "disk",
        "saved_inputs": "disk",
        "max_steps": 3,
        "activations": "page,0-1=recompute,4-5=recompute",
    }
    need = read_inputs(make_config(TINY, tmp_path, cache_dir=str(tmp_path / "cache"), **knobs))[0].predict().disk_bytes
    config = make_config(TINY, tmp_path, cache_dir=str(tmp_path / "cache"), disk_memory=f"{need}B", **knobs)
    assert finetune(config) is not None
    peak = max(line["peak_disk_bytes"] for line in metrics_of(config)[0])
    assert 0.5 * need < peak <= need


# folders in memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_memory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY))
    yield folder
    shutil.rmtree(folder)


@needs_tmpfs
def test_page_and_cache_folders_in_memory_are_refused_together(refuses, in_memory):
    flags = ["--optimizer-states", "disk", "--page-dir", in_memory / "pages", "--cache-dir", in_memory / "cache"]
    text = refuses(*flags)
    assert "--page-dir: " in text and "--cache-dir: " in text
    assert "would take memory outside the budget" in text and "--cache-dir" in text
    assert not list(in_memory.iterdir())


@needs_tmpfs
def test_a_cache_folder_in_memory_is_refused_with_a_copy_in_it(refuses, in_memory):
    four_bit_folder(find_model(str(TINY)), cache_dir=str(in_memory))
    assert "--cache-dir: " in refuses("--cache-dir", in_memory)


@needs_tmpfs
def test_a_link_into_memory_is_seen_through(refuses, in_memory, tmp_path):
    (tmp_path / "link").symlink_to(in_memory)
    assert "tmpfs" in refuses("--cache-dir", tmp_path / "link" / "cache")


@needs_tmpfs
def test_folders_in_memory_that_the_run_does_not_use_are_no_fault(run, in_memory, tmp_path):
    """A model that is in 4 bits already needs no cache; without paging there are no page files."""
    ready, _ = four_bit_folder(find_model(str(TINY)), cache_dir=str(tmp_path / "ready"))
    code, text = run("--model", ready, "--page-dir", in_memory, "--cache-dir", in_memory, "--dry-run")
    assert code == 0, text
    assert "page_dir has no effect" in text and "lies in memory" not in text


@needs_tmpfs
def test_a_ready_model_in_memory_is_said(run, in_memory):
    """It was there before the run and does not grow in it, so it is the user's business, but no budget counts it."""
    ready, _ = four_bit_folder(find_model(str(TINY)), cache_dir=str(in_memory))
    code, text = run("--model", ready, "--weights", "disk", "--dry-run")
    assert code == 0, text
    assert "warning" in text and "lies in memory" in text and "count in no budget" in text


def test_a_run_goes_on_within_a_smaller_budget_to_the_same_bytes(data, tmp_path, run):
    """One step with all memory, the next one with the least that is predicted to do, held by the kernel."""
    rest = ("--schedule", "constant", "--warmup-ratio", 0)
    run(*rest)
    whole = (tmp_path / "out" / ADAPTER_NAME).read_bytes()
    first = run_child(data, tmp_path, "first", *rest, "--max-steps", 1)
    assert first.code == 0 and "weights resident; activations keep" in first.picked, first.stderr
    other = (*rest, "--output", tmp_path / "other")
    _, most = run(*other, "--dry-run")
    _, least = run(*other, "--device-memory", "50MB")
    distance = predicted(most) - predicted(least)
    budget = first.run["predicted"]["device_bytes"] - distance + 8 * MIB  # a child's libraries waver by some MiB
    again = run_child(data, tmp_path, "first", *rest, "--resume", "auto", "--device-memory", f"{budget}B")
    assert again.code == 0, again.stderr
    assert again.picked != first.picked and "resumed after step 1" in again.stderr
    assert again.max_rss_bytes <= budget
    assert (again.output / ADAPTER_NAME).read_bytes() == whole
