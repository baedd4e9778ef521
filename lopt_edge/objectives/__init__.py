"""Objectives: what a run's task loss is. `sft` is the cross-entropy of replies; the others learn from preferences.

Each is a record of what it needs and a formula in plain floats (pairs.py, labelled.py), from the summed log-probabilities
of whole sequences to the loss and its slope by each of them. How those sums come about, and how a slope becomes a gradient,
is run/step/preference_loss.py's matter. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping

from lopt_edge.objectives.labelled import KTO
from lopt_edge.objectives.objective import Objective, ObjectiveOptions, of_settings
from lopt_edge.objectives.pairs import DPO, ORPO, SIMPO

OBJECTIVES: Mapping[str, Objective] = {one.name: one for one in (DPO, ORPO, SIMPO, KTO)}


def objective_of(settings: ObjectiveOptions) -> Objective | None:
    """The objective of a run with its settings in it; None for sft."""
    found = OBJECTIVES.get(settings.objective)
    return None if found is None else of_settings(found, settings)


def objectives_with(setting: str) -> tuple[str, ...]:
    """The objectives that use a setting; none if it is no setting of theirs."""
    return tuple(name for name, one in OBJECTIVES.items() if setting in one.settings)


__all__ = ["OBJECTIVES", "Objective", "ObjectiveOptions", "objective_of", "objectives_with"]
