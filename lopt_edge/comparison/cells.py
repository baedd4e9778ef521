"""The runs of a comparison: each a `finetune` in a process of its own, so that its peaks are its own.

A cell is one variant at one learning rate with one seed. It has a folder (`finetune`'s output), and beside it, by the
folder's name, `.yaml` with its settings and `.log` with what it printed. Where a cell stands is read from these alone, so
the same command goes on where an earlier one ended: a finished run is not run again, an unfinished one is taken up
(`--resume auto`), one with other settings is refused by name.

At most so many processes run at once; the loop that watches them has no threads. When it is interrupted each child is
asked once to stop (it saves where it stands), and waited for. The children are in sessions of their own, so that a
terminal's Ctrl-C does not reach them a second time, which would end them unsaved. No torch here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from lopt_edge.adapters.base import RUN_NAME
from lopt_edge.comparison.variants import Variant
from lopt_edge.config.load import load_config, with_absolute_paths
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, Interrupted, RunError
from lopt_edge.training.checkpoint.output_folder import SETTINGS_NAME

PAUSE_SECONDS = 0.05
LONGEST_REASON = 300
ATTEMPT = "lopt-edge compare: runs at once: "  # before each attempt in the log
QUANTISE = (
    "import sys; from lopt_edge.models.folder import find_model; "
    "from lopt_edge.models.four_bit import four_bit_folder; "
    "model, revision, cache = (word or None for word in sys.argv[1:]); "
    "four_bit_folder(find_model(model, revision=revision), cache_dir=cache)"
)


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison, described by its settings alone; `folder` is its output."""

    variant: Variant
    lr: float
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return Path(self.config.output)

    @property
    def name(self) -> str:
        """The variant, learning rate and seed, in words."""
        return f"{self.variant.name}, lr {self.lr:g}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether the run came to its end: its run.json, the last file written, is there."""
        return (self.folder / RUN_NAME).is_file()

    def beside(self, ending: str) -> Path:
        """The path beside the folder that has its name and this ending."""
        return self.folder.with_name(self.folder.name + ending)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as given, without what the cells would write to one place."""
        found = self.config.model_dump(mode="json", exclude_unset=True)
        found.pop("memory_report", None)
        return found

    def check(self) -> None:
        """Refuse a folder with something else in it, or a run with other settings (InputError)."""
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not found - {".lock"}:
            return
        if SETTINGS_NAME not in found:
            raise InputError(
                "holds no run of finetune", where=str(self.folder), fix="move it away, or choose another --output"
            )
        before = load_config(self.folder / SETTINGS_NAME)
        was, now = comparable(before), comparable(load_config(None, self.settings))
        differing = [f"{key} was {was.get(key)!r}, is {now[key]!r}" for key in now if was.get(key) != now[key]]
        if differing:
            raise InputError(
                f"holds a run with other settings: {'; '.join(differing)}",
                where=str(self.folder),
                fix="put them back, move the folder away, or choose another --output",
            )

    @property
    def attempts(self) -> list[str]:
        """The log of each attempt; its first line is how many ran at once."""
        try:
            text = self.beside(".log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return text.split(ATTEMPT)[1:]

    @property
    def shared_machine(self) -> bool:
        """Whether any attempt ran beside others, so that its seconds are not its own."""
        return any(attempt.partition("\n")[0] != "1" for attempt in self.attempts)

    @property
    def reason(self) -> str:
        """A sentence on why the run is not done."""
        if not self.attempts:
            return "not run yet"
        return failure_of(self.attempts[-1].partition("\n")[2]) or "ended without a word"


def comparable(config: Config) -> dict[str, Any]:
    """The settings that decide what a run is; paths that are there are absolute."""
    found = with_absolute_paths(config.model_dump(mode="json"))
    chosen = ("boundary", "boundary_layers") if config.boundary is not None else ()  # what auto found is in its place
    return {key: value for key, value in found.items() if key not in ("output", "resume", "memory_report", *chosen)}


def failure_of(log: str) -> str:
    """The last error in a log, on one line; else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.startswith(("error:", "interrupted"))]
    text = " ".join(lines[starts[-1] :] if starts else lines[-1:]).removeprefix("error: ")
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A child process to be: what it runs, where it writes, what it is called, and how its end is put in words."""

    words: tuple[str, ...]
    log: Path
    name: str
    outcome: Callable[[], str]  # a sentence once it ended


def finetune_job(cell: Cell) -> Job:
    """The job that runs a cell, whose settings are written for the child to read. Raises RunError."""
    path = cell.beside(".yaml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(cell.settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path)) from None
    code = "from lopt_edge.cli.main import main; main()"
    words = (sys.executable, "-c", code, "finetune", str(path), "--resume", "auto")
    return Job(words, cell.beside(".log"), cell.name, lambda: "done" if cell.done else f"FAILED: {cell.reason}")


def quantise_job(config: Config, log: Path) -> Job:
    """The job that makes the 4-bit copy before the first run: whichever made it would show a peak that is not its own."""
    words = (sys.executable, "-c", QUANTISE, config.model, config.revision or "", config.cache_dir or "")
    return Job(words, log, f"4-bit copy of {config.model}", lambda: "ready")


def run_jobs(jobs: Sequence[Job], *, at_once: int, say: Callable[[str], None]) -> None:
    """Run all jobs, at most `at_once` at a time. Whether they ended well is to be seen from what they left.

    Raises Interrupted after a signal, once the children have saved where they stand.
    """
    waiting, running, n_ended = list(jobs), list[tuple[Job, subprocess.Popen[bytes], IO[bytes], float]](), 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running.append(_start(job, at_once))
                say(f"{job.name} ...")
            for one in [one for one in running if one[1].poll() is not None]:
                running.remove(one)
                n_ended += 1
                say(f"[{n_ended}/{len(jobs)}] {one[0].name}: {_end(*one)}")
            time.sleep(PAUSE_SECONDS if running else 0)
    except KeyboardInterrupt as stop:
        _stop([child for _, child, *_ in running], say)
        if isinstance(stop, Interrupted):
            raise Interrupted(stop.signal_number, "go on with the same command") from None
        raise
    finally:
        for _, child, log, _ in running:
            if child.poll() is None:
                child.kill()
            log.close()


def _start(job: Job, at_once: int) -> tuple[Job, subprocess.Popen[bytes], IO[bytes], float]:
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        log.write(f"{ATTEMPT}{at_once}\n".encode())
        log.flush()
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(job.log)) from None
    child = subprocess.Popen(
        job.words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(at_once), start_new_session=True
    )
    return job, child, log, time.monotonic()


def environment(at_once: int) -> dict[str, str]:
    """The environment of a child: the cores are divided among the children.

    One alone is left what the user or torch chooses.
    """
    if at_once == 1:
        return dict(os.environ)
    share = max(1, len(_cores()) // at_once)
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return {**os.environ, "OMP_NUM_THREADS": str(min(share, int(stated)) if stated.isdigit() else share)}


def _cores() -> Sequence[int]:
    return [*os.sched_getaffinity(0)] if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _end(job: Job, child: subprocess.Popen[bytes], log: IO[bytes], begin: float) -> str:
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        with suppress(OSError):
            log.write(f"error: the process was ended by {name}{hint}\n".encode())
            log.flush()
    log.close()
    return f"{job.outcome()} ({time.monotonic() - begin:.0f} s)"


def _stop(children: Sequence[subprocess.Popen[bytes]], say: Callable[[str], None]) -> None:
    """Ask each to stop, once, and wait until it has saved."""
    for child in _alive(children):
        child.send_signal(signal.SIGINT)
    if any(_alive(children)):
        say("waiting for the runs under way to save where they stand; once more ends this at once")
    for child in _alive(children):
        child.wait()


def _alive(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[subprocess.Popen[bytes]]:
    return (child for child in children if child.poll() is None)
