"""The way out of the command line: where results, notes and errors are shown, and what becomes of a reader that is gone.

Two rules. Text of foreign files (names, tokens, what a file says) reaches no terminal as a command: every text that a
console lays out goes through `printable`, last of all, so no caller can forget it; what is printed without a console
(`say`, `stream`) does as well. And a message that cannot be printed ends no run: when a write fails (closed pipe, full disk
under a log, terminal gone), the stream leads nowhere from then on, for libraries and the interpreter's exit too. A stream
that was closed from the start leads nowhere as well, else the next file that is opened would get its number, and whatever
is printed would be written into that file.

The exit code stays the run's. A command that has nothing but its printed text to show (plan, data check, generate) ends
with code 1 if a disk did not take it; a reader that has enough (`| head`) is no fault.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from lopt_edge.errors import InputError, LoptError
from quant.untrusted import printable


class SafeConsole(Console):
    """A console whose texts hold no command for the terminal; its own colours and cursor movements stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable, their text printable."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


out = SafeConsole(highlight=False, emoji=False, soft_wrap=True)
err = SafeConsole(stderr=True, highlight=False, emoji=False)


def say(text: str) -> None:
    """Print a sentence to stderr."""
    err.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    err.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)


def show_error(text: str) -> None:
    """Print an error to stderr."""
    err.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)


def stream(text: str) -> None:
    """Print a piece of text to stdout, at once. Newlines and tabs stay. Ends the program when nobody reads it."""
    print(printable(text), end="", flush=True)
    if streams.lost_output is not None:
        sys.exit(streams.exit_code(0))


def exit_code_of(run: Callable[[], object]) -> int:
    """The exit code of a command; an error of ours, of the system's memory or of a path too long is shown in words."""
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except LoptError as error:
        show_error(str(error))
        return error.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # a folder's name, and ours in it
            show_error(str(InputError("the path is too long", where=str(error.filename), fix="use a shorter one")))
            return InputError.exit_code
        # torch's out-of-memory error, by name: this file does not import torch
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        show_error(f"out of memory ({' '.join(str(error).split())[:200]})")
        say("  -> lower --max-seq-len or --batch-size, or use --device cpu")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


class _Descriptor(io.FileIO):
    """A file descriptor that is written to while it can be, and leads nowhere after that."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (n_bytes := super().write(data)) is None:  # set not to block by whoever shares it
                select.select([], [self.fileno()], [])
            return n_bytes
        except OSError as error:
            self.lost = error
            _lead_nowhere(self.fileno())
            return len(data)


def _lead_nowhere(descriptor: int) -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere == descriptor:
            os.set_inheritable(descriptor, True)
        else:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class Streams:
    """This process' stdout and stderr, once `guard` has put them where their loss is no error."""

    result_is_on_disk = False  # what was asked for is a file: what is printed is beside it

    def __init__(self) -> None:
        self._output: _Descriptor | None = None

    def guard(self) -> None:
        """Put guarded streams in the place of the process' own (not of a test's or a notebook's)."""
        for descriptor in (0, 1, 2):
            try:
                os.fstat(descriptor)
            except OSError:
                _lead_nowhere(descriptor)
        if sys.stdout is sys.__stdout__:
            self._output = _Descriptor(1, "wb", closefd=False)
            sys.stdout = _text(self._output, sys.stdout)
        if sys.stderr is sys.__stderr__:
            sys.stderr = _text(_Descriptor(2, "wb", closefd=False), sys.stderr, by_line=True)

    @property
    def lost_output(self) -> OSError | None:
        """Why stdout can no longer be written; None while it can."""
        return None if self._output is None else self._output.lost

    def exit_code(self, code: int) -> int:
        """The exit code in the place of `code`: 1, and a sentence, where a result that was to be printed is lost."""
        if self._output is None:
            return code
        sys.stdout.flush()
        lost = self.lost_output
        if lost is None or lost.errno == errno.EPIPE:
            return code
        what = "the rest was not printed" if self.result_is_on_disk else "the result is lost"
        show_error(f"stdout cannot be written ({lost.strerror}): {what}")
        return code if self.result_is_on_disk else code or 1


def _text(raw: _Descriptor, own: TextIO | None, *, by_line: bool = False) -> TextIO:
    """A text stream like `own`; a character that its encoding lacks is shown by its number."""
    with suppress(ValueError, AttributeError):
        own.flush()  # type: ignore[union-attr]  # None if the descriptor was closed
    encoding = own.encoding if own is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=by_line or raw.isatty()
    )


streams = Streams()
