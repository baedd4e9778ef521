"""What a run shows while it runs: a live line on a terminal, plain lines elsewhere, nothing by default.

`Progress` is the silent form that the Python API uses; `TerminalProgress` draws. Training calls these few methods and
knows nothing of terminals. A listener that hears notes hears details and evaluations, too, unless it tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Progress:
    """A listener to notes, warnings, steps and evaluations that shows nothing."""

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Hear what the run is, before it begins: names and short texts."""

    def note(self, text: str) -> None:
        """Hear a sentence about what was chosen or done."""

    def detail(self, text: str) -> None:
        """Hear a sentence that only who looks closely wants: reasons, a plan's hash."""
        self.note(text)

    def warn(self, text: str) -> None:
        """Hear what the user should know before the run goes on."""

    def phase(self, name: str) -> None:
        """Hear what goes on from now: read, quantise, load, evaluate, train, sample, save; empty when it is over."""

    def start(self, n_steps: int, *, done: int = 0, budget_bytes: int | None = None) -> None:
        """Hear that training begins; `done` of `n_steps` steps were done by an earlier run.

        `budget_bytes` is what the device may take: as stated, or what was free.
        """

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Hear of a finished optimizer step; the keys are those of metrics.jsonl."""

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """Hear of an evaluation after `step` steps; losses by the names of metrics.jsonl."""
        self.note(f"step {step}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))

    def stop(self) -> None:
        """Hear that training ended, well or not."""
