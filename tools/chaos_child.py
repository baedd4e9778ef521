"""Runs in forked children that can be killed where one wants, and the proof of where a SIGKILL landed (chaos.py).

`Forks` forks a child for each attempt from a process that has imported everything once; it has one thread and runs no
torch operation, so a fork is clean. `Target` says when the child is killed.

`Board` is a small anonymous shared mapping with one byte for each phase: how many calls of this phase the run is inside
of. The parent makes it before it forks a run, and reads it after it has reaped the killed child: nobody writes any more
then, so what stands there is where the child was when it died. (A byte is written at once; entry is marked just before
the real call and exit just after, so a mark is off by the microseconds of a Python call at most.)

`Watch` marks the phases in the child: it replaces the functions below by ones that mark and call the real ones. The
product has no hooks for that and gets none; only the forked child of this harness is changed.

A page transfer of a model that is small enough for 300 runs lasts microseconds, too short to be hit on purpose. So while
the parent has set `stretched`, a transfer is done in two halves with a pause between ("half a page"): a kill there leaves
a page half written (or half read). Nothing else differs, and attempts that are not aimed at pages are not stretched.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lopt_edge.config.settings import Config

PHASES = ("start", "read inputs", "make ready", "quantise", "load", "restore", "page write", "page read", "half a page",
          "checkpoint", "prune", "evaluate", "save adapter", "log")  # fmt: skip
CHECKPOINTS, LOADING = frozenset({"checkpoint"}), frozenset({"quantise", "load"})  # what the quotas count
PAGES = frozenset({"page write", "page read"})
PAUSE_SECONDS = 0.02  # in the middle of a stretched transfer
PRELOADED = ("peft", "bitsandbytes", "transformers.models.llama.modeling_llama", "lopt_edge.training.run", "quant.quantise",
             "tools.tiny_runs")  # fmt: skip
LONGEST_SECONDS = 300  # of an attempt: beyond, it hangs
POLL_SECONDS = 0.0003


class Board:
    """A board of how often each phase is entered and not yet left, in memory shared with the children that are forked
    later."""

    def __init__(self) -> None:
        self._cells = mmap.mmap(-1, mmap.PAGESIZE)

    def clear(self) -> None:
        self._cells[:] = bytes(len(self._cells))

    def add(self, phase: str, change: int) -> None:
        self._cells[PHASES.index(phase)] += change

    def inside(self) -> frozenset[str]:
        """The phases that the run is in, or was in when it died."""
        return frozenset(phase for at, phase in enumerate(PHASES) if self._cells[at])

    @property
    def stretched(self) -> bool:
        return bool(self._cells[len(PHASES)])

    def stretch(self) -> None:
        self._cells[len(PHASES)] = 1


class Watch:
    """A watch that marks phases on the board from now on. `seconds`: of each phase, one entry for each time it was left."""

    def __init__(self, board: Board) -> None:
        self.board, self.seconds = board, {phase: list[float]() for phase in PHASES}
        self._lock = threading.Lock()  # page transfers run in worker threads
        self._starting = True
        board.add("start", 1)
        self._install()

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """A context that marks the phase on the board."""
        began = time.perf_counter()
        with self._lock:
            self.board.add(phase, 1)
        try:
            yield
        finally:
            with self._lock:
                self.board.add(phase, -1)
                self.seconds[phase].append(time.perf_counter() - began)

    def _install(self) -> None:
        from lopt_edge.models import four_bit
        from lopt_edge.run.tiers.page_file import PageFile
        from lopt_edge.system.files import JsonLines
        from lopt_edge.training import run as training
        from lopt_edge.training.session import loaded, saving, session

        for home, name, phase in (
            (training, "read_inputs", "read inputs"),
            (training, "_make_ready", "make ready"),
            (four_bit, "quantise_model", "quantise"),
            (loaded, "load_model", "load"),
            (loaded, "restore", "restore"),
            (saving, "prune", "prune"),
            (session, "evaluate", "evaluate"),
            (session, "save_adapter", "save adapter"),
            (JsonLines, "write", "log"),
        ):
            setattr(home, name, self._marked(phase, getattr(home, name)))
        for home, name, wrapped in (
            (session.Session, "_run_and_evaluate", self._after_start),
            (saving, "new_checkpoint", self._marked_checkpoint),
        ):
            setattr(home, name, wrapped(getattr(home, name)))
        for name in ("write", "read"):
            setattr(PageFile, name, self._transfer(f"page {name}", getattr(PageFile, name)))

    def _marked(self, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.inside(phase):
                return real(*arguments, **options)

        return call

    def _marked_checkpoint(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def call(*arguments: Any, **options: Any) -> Iterator[Any]:
            with self.inside("checkpoint"), real(*arguments, **options) as value:
                yield value

        return call

    def _after_start(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The start is over when evaluation and training begin."""

        def call(*arguments: Any, **options: Any) -> Any:
            if self._starting:
                self._starting = False
                self.board.add("start", -1)
            return real(*arguments, **options)

        return call

    def _transfer(self, phase: str, real: Callable[[Any, int, memoryview], None]) -> Callable[..., None]:
        def call(file: Any, offset: int, data: memoryview) -> None:
            with self.inside(phase):
                if not self.board.stretched or not data.nbytes:
                    real(file, offset, data)
                    return
                data = data.cast("B")
                half = data.nbytes // 2
                real(file, offset, data[:half])
                with self.inside("half a page"):
                    time.sleep(PAUSE_SECONDS)
                real(file, offset + half, data[half:])

        return call


# attempts ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A moment to kill: wait `seconds`, then until it was in `phase`, if one is named, for `seconds_inside`; then kill."""

    seconds: float
    phase: frozenset[str] = frozenset()
    seconds_inside: float = 0.0


@dataclass(frozen=True)
class Ended:
    """The end of an attempt: `phases` where it was killed, None where it ended by itself, with `code` (None: it hung)."""

    child: int  # process id
    phases: frozenset[str] | None
    code: int | None = 0


class Forks:
    """A runner of attempts in children. `log` gets what they print."""

    def __init__(self, folder: Path) -> None:
        for name in PRELOADED:
            importlib.import_module(name)
        if (n_threads := psutil.Process().num_threads()) != 1:
            sys.exit(f"this process has {n_threads} threads after its imports: a fork would not be clean")
        self.board, self.log, self.measured = Board(), folder / "child.log", folder / "phases.json"

    def call(self, work: Callable[[], Any], target: Target | None = None) -> Ended:
        """Run `work` in a child, which is killed as `target` says."""
        self.board.clear()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            self._child(work)
        return self._watch(child, target)

    def run(self, config: Config, target: Target | None = None) -> Ended:
        def work() -> None:
            from lopt_edge.training.run import finetune

            watch = Watch(self.board)
            finetune(config)
            self.measured.write_text(json.dumps(watch.seconds))

        return self.call(work, target)

    def _child(self, work: Callable[[], Any]) -> None:
        code = 1
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _watch(self, child: int, target: Target | None) -> Ended:
        began, entered = time.monotonic(), 0.0
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return self._ended(child, status)
            now = time.monotonic()
            if now - began > LONGEST_SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Ended(child, None, code=None)
            if target is not None and now - began >= target.seconds:
                if target.phase & PAGES:
                    self.board.stretch()
                is_there = not target.phase or target.phase & self.board.inside()
                entered = (entered or now) if is_there else 0.0  # there no more: the next time, then
                if entered and now - entered >= target.seconds_inside:
                    os.kill(child, signal.SIGKILL)
                    return self._ended(*os.waitpid(child, 0))
            time.sleep(POLL_SECONDS)

    def _ended(self, child: int, status: int) -> Ended:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return Ended(child, self.board.inside())
        return Ended(child, None, code=os.waitstatus_to_exitcode(status))
