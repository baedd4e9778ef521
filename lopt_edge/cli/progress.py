"""Progress on a terminal: one line a step, with losses, speed and memory; notes and warnings above it.

The rule: whatever is shown here is in the logs, too. It prints; what a run reports is training/session/progress.py's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lopt_edge.training.session.progress import Progress


class TerminalProgress(Progress):
    """A progress that draws on a console.

    Without a terminal it prints a line a step, at most one every two seconds, and the last one.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: RichProgress | None = None
        self.n_steps, self.done, self.started, self.last_line = 0, 0, 0.0, 0.0

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)

    def start(self, n_steps: int, *, done: int = 0) -> None:
        self.n_steps, self.done, self.started = n_steps, done, time.perf_counter()
        if self.console.is_terminal:
            columns = (
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self.bar = RichProgress(*columns, console=self.console)
            self.bar.add_task("first step", total=n_steps, completed=done)
            self.bar.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        text = _metrics_text(metrics)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=metrics["step"], description=text)
            return
        now, last = time.perf_counter(), metrics["step"] == self.n_steps
        if now - self.last_line >= 2 or last:
            left = (now - self.started) / (metrics["step"] - self.done) * (self.n_steps - metrics["step"])
            self.last_line = now
            self.console.print(
                f"step {metrics['step']}/{self.n_steps}  {text}  {left:.0f} s left", highlight=False, soft_wrap=True
            )

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _metrics_text(metrics: Mapping[str, Any]) -> str:
    kind = f"({metrics['kind']})" if "kind" in metrics else ""  # of several kinds of step
    local = " ".join(f"{value:.4f}" for value in metrics["local_loss"])
    parts = [f"loss {metrics['loss']:.4f}{kind and ' ' + kind}", *([f"local {local}"] if local else [])]
    parts += [f"align {metrics['align_loss']:.4f}"] if "align_loss" in metrics else []
    parts.append(f"{metrics['tokens'] / max(metrics['step_seconds'], 1e-9):.0f} tok/s")
    parts.append(f"peak {metrics['peak_device_bytes'] / 2**20:.0f} MiB")
    return "  ".join(parts)
