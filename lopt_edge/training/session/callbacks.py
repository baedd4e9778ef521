"""Callbacks of the Python API: functions that hear of steps and evaluations as typed records, and may end the run.

The rule: what they hear is what the logs have; one that returns "stop" ends the run after this step, as any end is
(evaluated, saved). An error in a callback ends the run as an error of the caller: it is not caught.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lopt_edge.run.step.preference_loss import SHOWN
from lopt_edge.training.session.progress import Progress

STOP = "stop"


@dataclass(frozen=True)
class StepRecord:
    """A finished optimizer step; `local_loss`, `lr` and `grad_norm` have an entry a segment.

    `choices` has what was measured of preferences, by the names of metrics.jsonl: rewards_margin, rewards_accuracy, ...
    """

    step: int
    n_steps: int
    loss: float
    local_loss: tuple[float, ...]
    lr: tuple[float, ...]
    grad_norm: tuple[float, ...]
    tokens: int
    seconds: float
    peak_device_bytes: int
    choices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation after `step` steps; a loss that was not asked for is None. `choices`: as of a step, of held-out
    preferences."""

    step: int
    held_out: float | None
    retention: float | None
    choices: Mapping[str, float] = field(default_factory=dict)


OnStep = Callable[[StepRecord], object]
OnEval = Callable[[EvalRecord], object]


class Callbacks(Progress):
    """A progress that passes everything on to another one, and steps and evaluations to functions."""

    def __init__(self, inner: Progress, on_step: OnStep | None, on_eval: OnEval | None) -> None:
        self.inner, self.on_step, self.on_eval = inner, on_step, on_eval
        self.n_steps, self.stopped = 0, False

    @property
    def asks_to_stop(self) -> bool:
        return self.stopped or self.inner.asks_to_stop

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        self.inner.facts(rows)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def detail(self, text: str) -> None:
        self.inner.detail(text)

    def warn(self, text: str) -> None:
        self.inner.warn(text)

    def phase(self, name: str) -> None:
        self.inner.phase(name)

    def start(self, n_steps: int, *, done: int = 0, budget_bytes: int | None = None) -> None:
        self.n_steps = n_steps
        self.inner.start(n_steps, done=done, budget_bytes=budget_bytes)

    def step(self, metrics: Mapping[str, Any]) -> None:
        self.inner.step(metrics)
        if self.on_step is not None:
            record = StepRecord(
                metrics["step"], self.n_steps, metrics["loss"], tuple(metrics["local_loss"]), tuple(metrics["lr"]),
                tuple(metrics["grad_norm"]), metrics["tokens"], metrics["step_seconds"], metrics["peak_device_bytes"],
                {name: metrics[name] for name in SHOWN if name in metrics},
            )  # fmt: skip
            self.stopped |= self.on_step(record) == STOP

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        self.inner.evaluated(step, losses)
        if self.on_eval is not None:
            choices = {name: losses[f"eval_{name}"] for name in SHOWN if f"eval_{name}" in losses}
            record = EvalRecord(step, losses.get("eval_loss"), losses.get("retention_loss"), choices)
            self.stopped |= self.on_eval(record) == STOP

    def stop(self) -> None:
        self.inner.stop()
