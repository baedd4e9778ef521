"""What a run's log says, in few points: the curves of its report, and of a comparison's page.

The rule: a log of a million steps becomes a few hundred means, read line by line, so that it takes neither memory nor a
second; evaluations are kept one by one. A line that is not whole ends the log. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_POINTS = 400  # of a curve; each is the mean of the steps around it
SMOOTHED = 20  # points that the thick line is the mean of, at most
NAMES = {"eval_loss": "held-out loss", "retention_loss": "retention loss"}
CHOICES = {"rewards_margin": "margin of rewards", "rewards_accuracy": "accuracy"}  # of preferences, in steps
Point = tuple[float, float]  # (step, value)


@dataclass
class Curves:
    """What the log says, in few points: means over equal runs of steps; evaluations one by one."""

    loss: list[Point] = field(default_factory=list)
    rate: list[Point] = field(default_factory=list)
    speed: list[Point] = field(default_factory=list)
    device_bytes: list[Point] = field(default_factory=list)
    evaluated: dict[str, list[Point]] = field(default_factory=dict)
    choices: dict[str, list[Point]] = field(default_factory=dict)  # by the names of CHOICES; of held-out data with eval_
    skipped: int = 0


def read_curves(log: Path, *, n_steps: int) -> Curves:
    """The curves of a log so far; a line that is not whole ends it."""
    found, width = Curves(), max(1, -(-n_steps // MOST_POINTS))
    group, choices = list[tuple[float, ...]](), list[dict[str, float]]()
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                values = json.loads(line)
            except ValueError:
                break
            if "skipped" in values:
                found.skipped += 1
            elif "loss" in values:
                group.append(_of_step(values))
                choices.append({name: values[name] for name in CHOICES if name in values})
                if values["step"] % width == 0:
                    _add(found, group, choices)
            else:
                for name in NAMES:
                    if name in values:
                        found.evaluated.setdefault(name, []).append((values["step"], values[name]))
                for name in CHOICES:
                    if (held_out := f"eval_{name}") in values:
                        found.choices.setdefault(held_out, []).append((values["step"], values[held_out]))
    _add(found, group, choices)
    return found


def _of_step(values: Mapping[str, Any]) -> tuple[float, ...]:
    speed = values["tokens"] / max(values["step_seconds"], 1e-9)
    return values["step"], values["loss"], max(values["lr"], default=0.0), speed, values["peak_device_bytes"]


def _add(found: Curves, group: list[tuple[float, ...]], choices: list[dict[str, float]]) -> None:
    """Add the means of a group of steps, which is emptied, at its last step; of labelled rows not every step has both."""
    if group:
        step = group[-1][0]
        columns = list(zip(*group, strict=True))
        for curve, column in zip((found.loss, found.rate, found.speed), columns[1:4], strict=True):
            curve.append((step, sum(column) / len(column)))
        found.device_bytes.append((step, max(columns[4])))
        for name in CHOICES:
            if there := [one[name] for one in choices if name in one]:
                found.choices.setdefault(name, []).append((step, sum(there) / len(there)))
        group.clear()
        choices.clear()


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The points with each value the mean of those before it and itself."""
    n = max(1, min(SMOOTHED, len(points) // 5))
    found = []
    for at, (x, _) in enumerate(points):
        values = [y for _, y in points[max(0, at - n + 1) : at + 1]]
        found.append((x, sum(values) / len(values)))
    return found
