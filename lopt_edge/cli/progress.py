"""The screen of a run: six facts, then one live line with loss, learning rate, speed, memory and the time that is left.

Rules: whatever is shown here is in the logs, too; nothing is wider than the terminal, and words do not break; numbers that
change stand in one place (a finished evaluation is a line above it, and stays in the live line). The loss that is shown is
smoothed, with its running mean over about ten steps; metrics.jsonl has each step's own. Without a terminal a step is a
plain line, at most one every two seconds, and the last one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.status import Status
from rich.table import Table
from rich.text import Text

from lopt_edge.training.session.progress import Progress

DOING = {
    "start": "starting",
    "read": "reading model and data, planning",
    "quantise": "quantising to 4 bits",
    "load": "loading the model",
    "teacher": "computing the teacher's features",
    "reference": "computing the reference's log-probabilities",
    "evaluate": "evaluating",
    "sample": "writing the sample",
    "save": "saving",
}  # what a phase of the run is in words; training has its own line
NAMES = {"eval_loss": "held-out loss", "retention_loss": "retention loss", "eval_rewards_margin": "margin",
         "eval_rewards_accuracy": "accuracy"}  # fmt: skip
SMOOTHING = 0.9  # of the running mean of the loss


class Smoothed:
    """A running mean that forgets: each value counts for 0.9 of what the next one does; the first ones count in full."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """The mean with this value in it."""
        self._sum = SMOOTHING * self._sum + value
        self._weight = SMOOTHING * self._weight + 1.0
        return self._sum / self._weight


class TerminalProgress(Progress):
    """A progress that draws on a console. `verbose`: with the reasons for what was chosen, and the plan's hash."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self.console, self.verbose = console, verbose
        self.bar: RichProgress | None = None
        self.status: Status | None = None
        self.n_steps, self.done, self.started, self.last_line = 0, 0, 0.0, 0.0
        self.budget_bytes: int | None = None
        self.loss, self.held_out, self.seconds = Smoothed(), "", Smoothed()

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        self._rest()
        if not self.console.is_terminal:
            for name, text in rows:
                self._print(f"{name:<8}{text}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(Text(name, style="bold"), Text(text))
        self.console.print(table)

    def note(self, text: str) -> None:
        self._print(text)

    def detail(self, text: str) -> None:
        if self.verbose:
            self._print(text, style="dim")

    def warn(self, text: str) -> None:
        self._print(f"[yellow]warning:[/yellow] {escape(text)}", markup=True)

    def phase(self, name: str) -> None:
        """A spinner beside what is done; inside training the live line says it."""
        doing = DOING.get(name, "")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], doing=doing)
            return
        self._rest()
        if doing and self.console.is_terminal:
            self.status = self.console.status(doing, spinner_style="cyan")
            self.status.start()

    def start(self, n_steps: int, *, done: int = 0, budget_bytes: int | None = None) -> None:
        self._rest()
        self.budget_bytes = budget_bytes
        self.n_steps, self.done, self.started = n_steps, done, time.perf_counter()
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(style="cyan"),
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[doing]}{task.description}"),
            )
            self.bar = RichProgress(*columns, console=self.console)
            self.bar.add_task("first step", total=n_steps, completed=done, doing="")
            self.bar.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        seconds = self.seconds.add(metrics["step_seconds"])
        left = in_clock(seconds * (self.n_steps - metrics["step"]))
        width = self.console.width - 2 * len(str(self.n_steps)) - 13 if self.bar is not None else 200
        text = fitted(self._parts(metrics, left), width)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=metrics["step"], description=text)
            return
        now, last = time.perf_counter(), metrics["step"] == self.n_steps
        if now - self.last_line >= 2 or last:
            self.last_line = now
            self._print(f"step {metrics['step']}/{self.n_steps}  {text}")

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        shown = {name: loss for name, loss in losses.items() if name in NAMES}
        self._print(f"step {step}: " + ", ".join(f"{NAMES[name]} {loss:.4f}" for name, loss in shown.items()))
        self.held_out = f"held-out {losses['eval_loss']:.3f}" if "eval_loss" in losses else ""

    def stop(self) -> None:
        self._rest()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _parts(self, metrics: Mapping[str, Any], left: str) -> list[tuple[int, str]]:
        """What there is to show, each with its rank: on a narrow terminal the highest ranks are left out."""
        kind = f" ({metrics['kind']})" if "kind" in metrics else ""  # of several kinds of step
        local = " ".join(f"{value:.4f}" for value in metrics["local_loss"])
        rate = max(metrics["lr"], default=0.0)
        speed = metrics["tokens"] / max(metrics["step_seconds"], 1e-9)
        parts = [
            (0, f"loss {self.loss.add(metrics['loss']):.3f}{kind}"),
            (5, f"local {local}" if local else ""),
            (6, f"align {metrics['align_loss']:.4f}" if "align_loss" in metrics else ""),
            (1, f"accuracy {metrics['rewards_accuracy']:.0%}" if "rewards_accuracy" in metrics else ""),
            (2, f"margin {metrics['rewards_margin']:+.3f}" if "rewards_margin" in metrics else ""),
            (4, self.held_out),
            (3, f"lr {rate:.1e}".replace("e-0", "e-")),
            (2, f"{speed:,.0f} tok/s"),
            (2, used(metrics["peak_device_bytes"], self.budget_bytes)),
            (1, f"{left} left"),
        ]
        return [(rank, text) for rank, text in parts if text]

    def _print(self, text: str, *, markup: bool = False, style: str | None = None) -> None:
        """A line above the live one: wrapped at words on a terminal, as it is elsewhere."""
        wide = not self.console.is_terminal
        self.console.print(text, highlight=False, soft_wrap=wide, markup=markup, style=style)

    def _rest(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None


def fitted(parts: Sequence[tuple[int, str]], width: int) -> str:
    """The parts on one line, those of the highest ranks left out until it fits."""
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept, key=lambda part: part[0]))
    return "  ".join(text for _, text in kept)


def used(n_bytes: int, budget_bytes: int | None) -> str:
    """The bytes, and what they may be, in one unit: 0.5/16.5 GiB, 471/1,907 MiB."""
    unit, name, digits = (2**30, "GiB", 1) if max(n_bytes, budget_bytes or 0) >= 4 * 2**30 else (2**20, "MiB", 0)
    most = "" if budget_bytes is None else f"/{budget_bytes / unit:,.{digits}f}"
    return f"{n_bytes / unit:,.{digits}f}{most} {name}"


def in_clock(seconds: float) -> str:
    """The seconds as a clock shows them: 0:42, 12:05, 3:07:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
