"""What a run shows while it runs: a rich progress bar on a terminal, plain lines elsewhere, nothing by default.

`Progress` is the silent form that the Python API uses; `TerminalProgress` draws. Training calls these few methods and
knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Progress:
    """Hears of notes, warnings, steps and evaluations, and shows nothing."""

    def note(self, text: str) -> None:
        """A sentence about what was chosen or done."""

    def warn(self, text: str) -> None:
        """Something the user should know before the run goes on."""

    def start(self, n_steps: int, *, done: int = 0) -> None:
        """Training begins; so many steps were done by an earlier run."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One optimizer step; the keys are those of metrics.jsonl."""

    def stop(self) -> None:
        """Training ended, well or not."""
