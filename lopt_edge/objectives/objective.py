"""What an objective is: a record of the data and the settings that it takes, and its formula.

The rule: a formula sees the summed log-probabilities of whole sequences and gives the loss, the slope of the loss by each
sum, and each sequence's reward; all in float64 on the host, since there are a few numbers a micro-batch. It is a sum over
pairs (or single sequences) with coefficients that are known before the first backward, as design law 5 asks: the counts of
the whole accumulation window stand in `Window`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import exp, inf, log1p
from typing import Literal

from pydantic import BaseModel, Field

ObjectiveName = Literal["sft", "dpo", "orpo", "simpo", "kto"]


class ObjectiveOptions(BaseModel):
    """The settings of objectives; `Config` has them as its own."""

    objective: ObjectiveName = Field("sft", description="sft: learn the replies; dpo, orpo, simpo, kto: learn preferences")
    beta: float | None = Field(None, gt=0, description="dpo, kto, simpo: scale of the rewards (default: 0.1; simpo 2.0)")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo, simpo: share of the pairs whose labels are wrong")
    simpo_gamma: float = Field(1.0, ge=0, description="simpo: margin that the chosen reward shall have")
    orpo_lambda: float = Field(0.1, gt=0, description="orpo: weight of the odds ratio beside the likelihood")
    desirable_weight: float = Field(1.0, gt=0, description="kto: weight of desirable rows")
    undesirable_weight: float = Field(1.0, gt=0, description="kto: weight of undesirable rows")


@dataclass(frozen=True)
class Scored:
    """A sequence: the summed log-probability of its targets, how many they are, and that sum under the reference.

    `preferred`: it is the chosen one of its pair, or a desirable one.
    """

    log_prob: float
    n_targets: int
    preferred: bool
    reference: float = 0.0


@dataclass(frozen=True)
class Window:
    """The counts of an accumulation window: pairs (or single sequences), and the targets of preferred sequences.

    `baseline` is KTO's reward of mismatched replies, which the window's rewards are compared with.
    """

    n_units: int
    n_preferred_targets: int = 0
    baseline: float = 0.0


@dataclass(frozen=True)
class Judged:
    """The part of the window's loss that some sequences have, its slopes by their log-probabilities, and their rewards."""

    loss: float
    slopes: tuple[float, ...]
    rewards: tuple[float, ...]


Formula = Callable[[tuple[Scored, ...], Mapping[str, float], Window], Judged]


@dataclass(frozen=True)
class Objective:
    """An objective by its name.

    `paired`: its unit is a pair, the chosen sequence first; else one sequence. `reads_reference`: it compares with the base
    model, adapters off. `compares`: with the rewards of mismatched replies, too. `settings` are those that it uses, with
    their defaults (of one that the run settled, their values); `rate` is the peak learning rate where none is given.
    """

    name: str
    paired: bool
    formula: Formula
    settings: Mapping[str, float] = field(hash=False)
    reads_reference: bool = False
    compares: bool = False
    rate: float = 5e-6

    @property
    def together(self) -> int:
        """How many sequences one unit has, which stay in one micro-batch."""
        return 2 if self.paired else 1

    @property
    def form(self) -> str:
        """The form of preferences that its data have (data/rows.py)."""
        return "pairs" if self.paired else "labels"

    def judged(self, sequences: tuple[Scored, ...], window: Window) -> Judged:
        """The loss, slopes and rewards of a micro-batch's sequences, unit after unit."""
        units = [sequences[at : at + self.together] for at in range(0, len(sequences), self.together)]
        found = [self.formula(unit, self.settings, window) for unit in units]
        return Judged(
            sum(one.loss for one in found),
            tuple(slope for one in found for slope in one.slopes),
            tuple(reward for one in found for reward in one.rewards),
        )


def of_settings(objective: Objective, settings: ObjectiveOptions) -> Objective:
    """The objective with the run's values in the place of its defaults."""
    given = {name: getattr(settings, name) for name in objective.settings}
    values = {name: default if given[name] is None else float(given[name]) for name, default in objective.settings.items()}
    return replace(objective, settings=values)


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), for any x."""
    return 1.0 / (1.0 + _exp(-x)) if x >= 0 else _exp(x) / (1.0 + _exp(x))


def log_sigmoid(x: float) -> float:
    """The logarithm of the sigmoid, exact where that is next to 0 or 1."""
    return -log1p(_exp(-x)) if x >= 0 else x - log1p(_exp(x))


def _exp(x: float) -> float:
    """e^x of what is at most 0, or no number."""
    return 0.0 if x == -inf else exp(x)
