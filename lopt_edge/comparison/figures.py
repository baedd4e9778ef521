"""The figures of a comparison: read from what each run left, then mean and standard deviation over the seeds.

`FIGURES` lists them in the order of the tables, once, with heading and form. A figure that a run does not have is None and
stays so: nothing is filled in, and a mean says over how many runs it is. The spread is the sample standard deviation
(n - 1), of two runs or more.

Where a figure comes from: losses and what an objective of preferences measures from run.json's evaluation (with keep_best
that of the saved adapter), peaks from its
`peaks`; step seconds are the median over metrics.jsonl, leaving out the first `WARM_UP` steps, tokens/s those steps' tokens
over their seconds, training seconds those of all steps (no loading, no evaluation); bytes moved are what plan.json predicts
for the largest step (they are not measured).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from lopt_edge.adapters.base import RUN_NAME
from lopt_edge.comparison.cells import Cell
from lopt_edge.pictures.svg import byte_unit

WARM_UP = 2  # steps: allocations, files read for the first time, the optimizer's states
MATCH_NAME = "exact-match.json"  # in a run's folder; exact_match.py writes it
ANSWERS_NAME = "closed-questions.json"  # in a run's folder; closed_questions.py writes it
Asked = tuple[str, int]  # data file, how many of its first rows


@dataclass(frozen=True)
class Closed:
    """The closed questions that are asked, and the share that the base answers (None: not counted)."""

    path: str
    of_base: float | None


@dataclass(frozen=True)
class Figure:
    """The form in which a figure is shown: `digits` of a number, None for bytes.

    With `always` it has a column also where no run has it, or all have 0.
    """

    heading: str
    digits: int | None
    always: bool = False
    percent: bool = False

    def text(self, mean: float, std: float | None) -> str:
        """The mean and spread in words, in the unit that suits the mean."""
        factor, unit, digits = (100.0, "%", 1) if self.percent else (1.0, "", self.digits)
        if digits is None:
            size, name = byte_unit(mean)
            factor, unit, digits = 1 / size, f" {name}", 2 if name == "GiB" else 1
        spread = "" if std is None else f" ± {std * factor:,.{digits}f}"
        return f"{mean * factor:,.{digits}f}{spread}{unit}"


FIGURES: dict[str, Figure] = {
    "eval_loss": Figure("held-out loss", 4, always=True),
    "preferred": Figure("chosen preferred", 1, percent=True),
    "margin": Figure("reward margin", 4),
    "exact_match": Figure("exact match", 1, percent=True),
    "retention_before": Figure("retention before", 4),
    "retention_after": Figure("retention after", 4),
    "forgetting": Figure("forgetting", 4),
    "answers_before": Figure("answers before", 1, percent=True),
    "answers_after": Figure("answers after", 1, percent=True),
    "peak_device_bytes": Figure("peak device", None, always=True),
    "peak_host_bytes": Figure("peak host", None),
    "peak_disk_bytes": Figure("peak disk", None),
    "step_seconds": Figure("step s", 3, always=True),
    "train_seconds": Figure("training s", 1),
    "tokens_per_second": Figure("tokens/s", 0, always=True),
    "bytes_moved": Figure("moved a step", None, always=True),
}


@dataclass(frozen=True)
class Spread:
    """The values of one figure over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """The mean; None without values."""
        return mean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n - 1); None of fewer than two values."""
        return stdev(self.values) if len(self.values) > 1 else None

    def text(self, figure: Figure) -> str:
        """Mean and spread in the figure's form; a dash without values."""
        if self.mean is None:
            return "-"
        return figure.text(self.mean, self.std)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell: its figures, or why there are none. `facts` are what all runs should share."""

    cell: Cell
    figures: Mapping[str, float | None] | None
    facts: Mapping[str, Any]
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the run was tried and left no figures."""
        return self.figures is None and (self.cell.done or bool(self.cell.attempts))

    @property
    def eval_loss(self) -> float | None:
        """The held-out loss; None where the run has none."""
        return None if self.figures is None else self.figures["eval_loss"]


def outcome_of(cell: Cell, asked: Asked | None = None, closed: Closed | None = None) -> Outcome:
    """The outcome of a cell, read from its files; one whose files cannot be read has that as its reason.

    `asked` says of which rows an exact match is to be shown, `closed` of which questions the answers.
    """
    if not cell.done:
        return Outcome(cell, None, {}, cell.reason)
    try:
        run = json.loads((cell.folder / RUN_NAME).read_text(encoding="utf-8"))
        return Outcome(cell, figures_of(run, cell.folder, asked, closed), _facts(run))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Outcome(cell, None, {}, f"its files cannot be read: {type(error).__name__} {str(error)[:200]}")


def figures_of(
    run: Mapping[str, Any], folder: Path, asked: Asked | None = None, closed: Closed | None = None
) -> dict[str, float | None]:
    """The figures in `FIGURES` of one finished run; None where it has none or it is not finite."""
    before, after, peaks = run["evaluation"]["before"], run["evaluation"]["after"], run["peaks"]
    was, is_now = before.get("retention_loss"), after.get("retention_loss")
    steps = [line for line in _lines(folder / "metrics.jsonl") if "step_seconds" in line]
    steps = steps[WARM_UP:] or steps
    seconds = [step["step_seconds"] for step in steps]
    found = {
        "eval_loss": after.get("eval_loss"),
        "preferred": after.get("eval_rewards_accuracy"),
        "margin": after.get("eval_rewards_margin"),
        "exact_match": match_of(folder, asked),
        "retention_before": was,
        "retention_after": is_now,
        "forgetting": None if was is None or is_now is None else is_now - was,
        "answers_before": None if closed is None else closed.of_base,
        "answers_after": None if closed is None else answers_of(folder / ANSWERS_NAME, closed.path),
        "peak_device_bytes": peaks.get("peak_device_bytes"),
        "peak_host_bytes": peaks.get("peak_host_bytes"),
        "peak_disk_bytes": peaks.get("peak_disk_bytes"),
        "step_seconds": median(seconds) if seconds else None,
        "train_seconds": run.get("seconds", {}).get("train"),
        "tokens_per_second": sum(step["tokens"] for step in steps) / sum(seconds) if sum(seconds) else None,
        "bytes_moved": _bytes_moved(folder / "plan.json"),
    }
    return {name: value if value is None or math.isfinite(value) else None for name, value in found.items()}


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that should be the same in all runs of a seed, and are shown where they are not."""
    before = run["evaluation"]["before"].get("eval_loss")
    return {
        "data": run["data"]["fingerprint"],
        "steps": run["totals"]["steps"],
        "tokens": run["totals"]["tokens"],
        "skipped steps": run["totals"].get("skipped_steps"),
        "device": run["device"],
        "compute dtype": run["compute_dtype"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "held-out loss before": None if before is None else round(before, 3),  # memory settings may change its rounding
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)


def match_of(folder: Path, asked: Asked | None) -> float | None:
    """The share that exact_match.py left for a run, if it is of these rows."""
    try:
        found = json.loads((folder / MATCH_NAME).read_text(encoding="utf-8"))
        return found["matches"] / found["rows"] if (found["data"], found["asked"]) == asked else None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def answers_of(file: Path, path: str) -> float | None:
    """The share of closed questions that closed_questions.py found answered, if it is of this file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["right"] / found["rows"] if found["data"] == path else None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _bytes_moved(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["plan"]["bytes_moved"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- one variant ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A variant with its runs at the learning rate taken. `tuning` are the runs that chose it (none without a grid)."""

    name: str
    slug: str
    lr: float | None  # None: the grid's runs are not all there, or none of them ended well
    outcomes: tuple[Outcome, ...]
    tuning: tuple[Outcome, ...] = ()

    def spread(self, figure: str) -> Spread:
        """The values of a figure over the runs that have it."""
        values = [outcome.figures.get(figure) for outcome in self.outcomes if outcome.figures is not None]
        return Spread(tuple(value for value in values if value is not None))

    @property
    def n_done(self) -> int:
        """The number of runs with figures."""
        return sum(outcome.figures is not None for outcome in self.outcomes)

    @property
    def problems(self) -> list[str]:
        """A sentence for each run that is not there."""
        found = [
            f"{outcome.cell.name}: {outcome.reason}" for outcome in (*self.tuning, *self.outcomes) if not outcome.figures
        ]
        return list(dict.fromkeys(found))  # a run of the grid may be one of the seeds'

    @property
    def failed(self) -> bool:
        """Whether any run failed, of the grid's or the seeds'."""
        return any(outcome.failed for outcome in (*self.tuning, *self.outcomes))

    @property
    def status(self) -> str:
        """The status in words: done, failed, not run, partly failed or incomplete."""
        if self.outcomes and self.n_done == len(self.outcomes):
            return "done"
        if not self.n_done:
            return "failed" if self.failed else "not run"
        return "partly failed" if self.failed else "incomplete"


def shown_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """The columns: figures that some run has and that are not 0 everywhere, and those that are always shown."""
    return {
        name: figure
        for name, figure in FIGURES.items()
        if figure.always
        or any(any(row.spread(name).values) for row in rows)
        or (figure.digits is not None and any(row.spread(name).values for row in rows))
    }
