"""Collects the faults of many rows, so that one pass over a data file shows all of them.

Rule: every fault is counted, the first `SHOWN` are shown in full, and the rest only as a number: a file with a million
broken rows still gives one readable message. Up to `SHOWN` faults travel as `InputErrors` (each stays a value of its
own); beyond that they become one `InputError`, whose text holds the first ones and the true count.
This file knows nothing about data files.
"""

from __future__ import annotations

from lopt_edge.errors import InputError, InputErrors, raise_collected

SHOWN = 20


class Faults:
    """A growing list of input errors with a bounded memory."""

    def __init__(self) -> None:
        self._kept: list[InputError] = []
        self.count = 0

    def add(self, error: InputError) -> None:
        """Take one error, or every error that travels inside an `InputErrors`."""
        several = error.errors if isinstance(error, InputErrors) else (error,)
        self.count += len(several)
        self._kept.extend(several[: SHOWN - len(self._kept)])

    def raise_any(self) -> None:
        """Raise what was collected; return when nothing was."""
        if self.count <= SHOWN:
            raise_collected(self._kept)
            return
        shown = "\n".join(f"- {error}" for error in self._kept)
        raise InputError(f"{self.count} problems, the first {SHOWN}:\n{shown}\n- ... and {self.count - SHOWN} more")
