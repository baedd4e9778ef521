"""What a run shows while it runs: a rich progress bar on a terminal, plain lines elsewhere, nothing by default.

`Progress` is the silent form that the Python API uses; `TerminalProgress` draws. Training calls these few methods and
knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Progress:
    """A listener to notes, warnings, steps and evaluations that shows nothing."""

    def note(self, text: str) -> None:
        """Hear a sentence about what was chosen or done."""

    def warn(self, text: str) -> None:
        """Hear what the user should know before the run goes on."""

    def start(self, n_steps: int, *, done: int = 0) -> None:
        """Hear that training begins; `done` of `n_steps` steps were done by an earlier run."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Hear of a finished optimizer step; the keys are those of metrics.jsonl."""

    def stop(self) -> None:
        """Hear that training ended, well or not."""
