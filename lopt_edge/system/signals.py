"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP do: the first asks the run to stop where nothing is lost, the second ends it at
once.

SIGHUP says that the terminal is gone; the kernel and the shell may both send it, so it never counts as a second signal, and
where it is ignored from the start (nohup) it stays so.

Inside `deferred()` (a training step, a checkpoint being written, an evaluation) the first signal is only noted, and the
caller looks at `check()` where it can stop: between two micro-batches. Anywhere else (loading, quantising, exporting)
it raises `Interrupted` there, and what is half done is undone by the usual `finally`. The second signal does not return:
a checkpoint half written is recognised as such by the next run, the one before is whole.

Signals are heard in the main thread only; elsewhere (a notebook's worker, a test) nothing is installed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lopt_edge.errors import Interrupted

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class Interrupts:
    """A listener for the signals of `HEARD` while `listening()`. `say` shows a sentence to the user."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.say = say
        self.signal_number: int | None = None
        self._depth = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which the signals are heard; at its end the handlers that were there before are back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in HEARD}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which a signal waits for `check`."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def note(self, number: int) -> None:
        """Take a signal that another process of the run heard, as if this one had; it never counts as a second one."""
        if self.signal_number is None:
            self.signal_number = number

    def check(self) -> None:
        """Raise Interrupted if a signal was heard."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if number == signal.SIGHUP:
                return
            with suppress(OSError, ValueError, AttributeError):  # stderr may be gone
                if sys.stderr.isatty():
                    os.write(2, SHOW_CURSOR.encode())
            os._exit(128 + number)
        self.signal_number = number
        if not self._depth:
            raise Interrupted(number)
        again = "SIGTERM" if number == signal.SIGHUP else "once more"
        with suppress(RuntimeError):  # the signal came while this very stream was being written
            self.say(
                f"{signal.Signals(number).name}: the micro-batch is finished and the run saved; {again} ends it at once"
            )
