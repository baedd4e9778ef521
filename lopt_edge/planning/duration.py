"""How long a whole run takes on given data: the planner's seconds for steps of the sizes that the data really have.

The planner's own seconds are those of the largest step; most steps are shorter. So a few windows of the first epoch, evenly
spaced, are timed by the same formulas, and their mean stands for all. An evaluation costs a share of a step's seconds for
each of its tokens, since it has a forward only; so do a reference's pass and the mismatched replies of each step. It says
how long, not when: what else the machine does is not known. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from lopt_edge.config.settings import Config
from lopt_edge.data import Dataset
from lopt_edge.objectives import objective_of
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.search.workload import Workload
from lopt_edge.planning.packing import mean_seconds, some_windows

N_TIMED = 8  # windows that stand for the epoch
FORWARD_SHARE = 1 / 3  # of a step's seconds for a token: forward alone, of forward and a backward of about two forwards


@dataclass(frozen=True)
class Duration:
    """The predicted duration of a run: its steps, the tokens that they see, and seconds."""

    n_steps: int
    n_tokens: int  # of all steps, padding left out
    n_examples: int
    train_seconds: float
    eval_seconds: float  # of all passes that have a forward only

    @property
    def seconds(self) -> float:
        """The seconds of steps and evaluations together."""
        return self.train_seconds + self.eval_seconds

    @property
    def tokens_per_second(self) -> float:
        """The tokens that the steps train on in a second, padding left out."""
        return self.n_tokens / self.train_seconds if self.train_seconds else 0.0


def duration(
    config: Config,
    workload: Workload,
    knobs: Knobs,
    *,
    train: Dataset,
    evaluated: Sequence[Dataset],
    order: tuple[int, int],
    mismatched: Sequence[Dataset] = (),
) -> Duration:
    """The duration of a run of these settings. `order`: batch_size and grad_accum of the windows; `config` may split
    them. `mismatched`: replies that an objective compares with, those of the training data first."""
    windows, n_windows = some_windows(train, config, order=order, n_windows=N_TIMED)
    n_steps = config.max_steps or config.epochs * n_windows
    seconds = mean_seconds(config, workload, knobs, train, windows[:1] if n_steps == 1 else windows)
    per_epoch = sum(train.lengths)
    n_tokens = round(per_epoch * n_steps / n_windows)
    held_out = sum(sum(data.lengths) for data in (*evaluated, *mismatched[1:]))
    n_evaluations = 2 + (n_steps - 1) // config.eval_every if config.eval_every else 2
    per_token = seconds * n_windows / per_epoch
    compared = sum(mismatched[0].lengths) * n_steps / n_windows if mismatched else 0.0
    if (objective := objective_of(config)) is not None and objective.reads_reference:
        compared += n_tokens if n_steps < n_windows else per_epoch
    return Duration(
        n_steps,
        n_tokens,
        ceil(len(train.examples) * n_steps / n_windows),
        seconds * n_steps,
        FORWARD_SHARE * per_token * (held_out * n_evaluations + compared),
    )


def in_words(seconds: float) -> str:
    """A duration in two units at most: 45 s, 12 min, 3 h 20 min, 2 days 5 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min" if rest and hours < 24 else f"{round(minutes / 60)} h"
    return f"{hours // 24} days {hours % 24} h"
