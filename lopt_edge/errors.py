"""The errors a user meets: what is wrong, where, and what to do about it.

Rule: whatever a person can cause by a wrong file, flag or folder ends in an `InputError` (exit code 2), and a run that
fails for other reasons ends in a `RunError` (exit code 1); one that a signal stopped in `Interrupted`. All are printed as
plain sentences; only a defect of ours shows a traceback. Several mistakes found together travel together (`InputErrors`).
This file prints nothing.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from typing import Any

from quant.untrusted import printable, printable_name

MOST_OF_A_WORD = 600  # letters
MOST_SHOWN = 60  # of errors shown together: more than a run has settings that matter to its resumption


class LoptError(Exception):
    """The base of every error that lopt-edge raises on purpose; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, text: str) -> None:
        super().__init__(_shortened(printable(text)))  # names and texts of foreign files stand in it


def _shortened(text: str) -> str:
    """The text with the middle left out of words that nobody reads, such as a path of 8,000 letters."""
    return re.sub(rf"\S{{{MOST_OF_A_WORD + 1},}}", lambda word: f"{word[0][:200]}...{word[0][-80:]}", text)


class InputError(LoptError):
    """An error in the input. `what` is wrong, `where` it stands (file:line, config key, flag), and the `fix`."""

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        text = f"{printable_name(where)}: {what}" if where else what
        super().__init__(f"{text}\n  -> {fix}" if fix else text)


class InputErrors(InputError):
    """Several input errors found in one pass, shown together."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        self.errors = tuple(errors)
        lines = [f"- {error}" for error in self.errors[:MOST_SHOWN]]
        lines += [f"- and {len(errors) - MOST_SHOWN} more"] if len(errors) > MOST_SHOWN else []
        super().__init__(f"{len(self.errors)} problems:\n" + "\n".join(lines))


def together(*asked: Callable[[], Any]) -> list[Any]:
    """The answers to all that is asked; the input errors of all of them are shown in one message."""
    found: list[Any] = []
    errors: list[InputError] = []
    for ask in asked:
        try:
            found.append(ask())
        except InputError as error:
            errors += error.errors if isinstance(error, InputErrors) else [error]
    raise_collected(errors)
    return found


class DoesNotFit(InputError):
    """A run that the budgets cannot hold; what is missing and what would fit is in the text."""

    exit_code = 3


class RunError(LoptError):
    """A run that could not go on; `where` names the op, the step or the path.

    `values_intact`: whether the adapters are still those of the last finished step.
    """

    values_intact = True

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        text = f"{printable_name(where)}: {what}" if where else what
        super().__init__(f"{text}\n  -> {fix}" if fix else text)


class OutOfMemory(RunError):
    """A step that the device's memory, or the budget that is kept, could not hold."""


class PeerLost(RunError):
    """The loss of another process of a pipeline, gone or silent. The step under way is lost with it."""

    values_intact = False


class Interrupted(KeyboardInterrupt):
    """The end of a run by SIGINT, SIGTERM or SIGHUP; `advice` says how to go on. It is no LoptError, so that nothing takes
    it for a fault."""

    def __init__(self, signal_number: int, advice: str = "") -> None:
        self.signal_number, self.advice = signal_number, advice
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}" + (f"; {advice}" if advice else ""))

    @property
    def exit_code(self) -> int:
        """The exit code by custom: 128 and the signal's number."""
        return 128 + self.signal_number  # as a shell counts: 130, 143 and 129


def raise_collected(errors: Sequence[InputError]) -> None:
    """Raise nothing for no error, the error itself for one, all of them together for several."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputErrors(errors)


class NotFinite(RunError):
    """An infinite or NaN loss or gradient of the step. `op`: the plan's op that found it."""

    untouched = True  # no group was updated before it
    op = ""

    def __init__(self, what: str, *, where: str = "", fix: str = "", of_loss: bool = False) -> None:
        self.of_loss = of_loss  # then no smaller loss scale helps
        advice = "lower --lr (and --lr-local); in float16, compute in bfloat16 or float32"
        super().__init__(what, where=where, fix=fix or advice)
