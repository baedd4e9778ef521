"""A run's batches where it learns from preferences: with their references, and with the baseline of the window (KTO).

The baseline is the mean reward of mismatched replies (objectives/labelled.py), found by a forward pass of the adapters as
they are before the step; since they change at its end only, a step that is taken up again inside finds the same number. An
evaluation takes that of all held-out replies. The pass takes what an evaluation does, and is planned as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lopt_edge.data import Window
from lopt_edge.objectives import Objective
from lopt_edge.objectives.labelled import baseline
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch, window_totals
from lopt_edge.run.step.preference_loss import choice_losses, log_probs
from lopt_edge.run.tiers.score_file import ScoreFile
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.reference import HELD_OUT, MISMATCHED, TRAIN


def _nothing() -> None:
    """Nothing is done between the batches of a window: a signal is heard when the step begins."""


@dataclass(frozen=True, eq=False)
class ChosenBatches:
    """The maker of batches of preferences. `references` are by the name of their data set."""

    inputs: Inputs
    objective: Objective
    references: Mapping[str, ScoreFile]

    def of_step(self, model: Model, window: Window) -> list[Batch]:
        """The batches of a step."""
        batches = [self.inputs.batch(self.inputs.train, indices) for indices in window]
        return self._compared(model, TRAIN, batches, _nothing, None)

    def held_out(
        self, model: Model, batches: Sequence[Batch], *, between: Callable[[], None], layers: Sequence[int] | None
    ) -> dict[str, float]:
        """The objective of the held-out batches as "loss", and the means of what is measured."""
        ready = self._compared(model, HELD_OUT, batches, between, layers)
        tile = self.inputs.knobs.token_tile
        return choice_losses(
            model, self.objective, ready, window_totals(ready), token_tile=tile, between=between, layers=layers
        )

    def _compared(
        self,
        model: Model,
        name: str,
        batches: Sequence[Batch],
        between: Callable[[], None],
        layers: Sequence[int] | None,
    ) -> list[Batch]:
        """The batches with references and baseline."""
        if not self.objective.reads_reference:
            return list(batches)
        values, found = self.references[name].values, 0.0
        if self.objective.compares:
            found = self._baseline(model, name, [i for batch in batches for i in batch.examples], between, layers)
        return [_with(batch, tuple(values[index] for index in batch.examples), found) for batch in batches]

    def _baseline(
        self,
        model: Model,
        name: str,
        examples: Sequence[int],
        between: Callable[[], None],
        layers: Sequence[int] | None,
    ) -> float:
        inputs, data = self.inputs, self.inputs.mismatched[name]
        references = self.references[MISMATCHED + name].values
        shares: dict[int, float] = {}
        for indices in inputs.groups(data, sorted(examples, key=data.lengths.__getitem__)):
            between()
            batch, n_targets = inputs.batch(data, indices), [data.target_counts[index] for index in indices]
            found = log_probs(model, batch, n_targets, token_tile=inputs.knobs.token_tile, layers=layers)
            shares |= dict(zip(indices, found, strict=True))
        return baseline(tuple(shares[index] for index in examples), tuple(references[index] for index in examples))


def _with(batch: Batch, reference: tuple[float, ...], found: float) -> Batch:
    assert batch.choices is not None
    return replace(batch, choices=replace(batch.choices, reference=reference, baseline=found))
