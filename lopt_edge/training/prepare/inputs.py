"""`Inputs`: all that a run has decided before it loads a weight, as one frozen record.

The rule: whatever needs the user's attention has been raised before an Inputs exists; who holds one may start. It knows
how to ask for its plans and its batches; it loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil, prod
from typing import TYPE_CHECKING, TypeVar

import torch

from lopt_edge.config.settings import Config
from lopt_edge.data import ChatTemplate, Dataset, Window, collate, epoch_windows, members, unit_lengths
from lopt_edge.models.folder import ModelFolder
from lopt_edge.objectives import Objective, objective_of
from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.plan.schedule.processes import Part, own_knobs
from lopt_edge.plan.schedule.ranks import shares
from lopt_edge.plan.search.run_plan import RunPlan
from lopt_edge.plan.search.workload import Workload
from lopt_edge.planning.packing import micro_batches
from lopt_edge.planning.question import Ground
from lopt_edge.run.step.batches import Batch, Choices, make_batch
from lopt_edge.run.tiers.staging import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")
MOST_PLANS = 16  # kept; a plan of an 8B is some 2,000 ops


@dataclass(frozen=True, eq=False)
class Inputs:
    """The record of all that was read and decided before the weights are touched."""

    config: Config
    source: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    train: Dataset
    held_out: Dataset | None
    retention: Dataset | None
    course: Course
    targets: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    knobs: Knobs
    budget: Budget
    ground: Ground
    workload: Workload
    run_plan: RunPlan
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    asked: Config | None = None  # the settings as given: `config` has what was settled
    order: tuple[int, int] = (1, 1)  # batch_size and grad_accum of the windows; `config` may split their micro-batches
    model: str = ""  # fingerprint
    teacher: ModelFolder | None = None  # where it is another model than the base
    teacher_model: str = ""  # its fingerprint
    mismatched: Mapping[str, Dataset] = field(default_factory=dict)  # for an objective that compares with them: by whose
    _plans: dict[tuple[StepKind, int], Plan] = field(default_factory=dict, init=False)  # of this record's knobs

    @property
    def evaluated(self) -> dict[str, Dataset]:
        """What is evaluated beside the steps, by the name of its loss."""
        named = {"eval_loss": self.held_out, "retention_loss": self.retention}
        return {name: data for name, data in named.items() if data is not None}

    @property
    def objective(self) -> Objective | None:
        """The objective of preferences, with the run's settings; None for replies."""
        return objective_of(self.config)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        per_epoch = ceil(self.train.n_units / prod(self.order))
        return self.config.max_steps or self.config.epochs * per_epoch

    def windows(self, *, first: int) -> Iterator[Window]:
        """Accumulation windows, epoch after epoch, without end; `first` counts from 0."""
        batch_size, grad_accum = self.order
        per_epoch = ceil(self.train.n_units / (batch_size * grad_accum))
        for epoch in count(first // per_epoch):
            found = epoch_windows(
                self.train.lengths,
                seed=self.config.seed,
                epoch=epoch,
                batch_size=batch_size,
                grad_accum=grad_accum,
                together=self.train.together,
            )
            skipped = first % per_epoch if epoch == first // per_epoch else 0
            yield from (self._cut(found[at], self.train) for at in range(skipped, len(found)))

    def _cut(self, window: Window, dataset: Dataset) -> Window:
        """The window's sequences in micro-batches: padded ones, or packed rows."""
        return micro_batches(window, dataset, self.config, self.source.facts)

    @property
    def part(self) -> Part | None:
        """The part of a pipeline that this process (process 0) runs; None without a pipeline.

        The other processes have no Inputs (training/pipeline/worker.py).
        """
        return self.workload.part

    @property
    def own_knobs(self) -> Knobs:
        """The memory settings of this process: other processes' layers are elsewhere."""
        return self.knobs if self.part is None else own_knobs(self.knobs, self.part)

    def plan(self, n_micro_batches: int, kind: StepKind | None = None) -> Plan:
        """The validated plan of a step over this many micro-batches (the last window of an epoch may be short).

        It is of the first kind of step, unless another is named. It is made and validated once and kept, the last
        MOST_PLANS of them: a method may draw a new kind for each step.
        """
        key = (kind or self.course.kinds[0], n_micro_batches)
        found = self._plans.pop(key, None) or self.workload.plan(self.knobs, n_micro_batches=n_micro_batches, kind=kind)
        self._plans[key] = found
        while len(self._plans) > MOST_PLANS:
            del self._plans[next(iter(self._plans))]
        return found

    def predict(self, batches: Sequence[MicroBatchSize] | None = None, kind: StepKind | None = None) -> Prediction:
        """The prediction for the largest step of the run, or for one over these micro-batches."""
        if batches is None:
            return self.workload.predict(self.knobs)
        return replace(self.workload, batches=tuple(batches)).predict(self.knobs, whole=True, kind=kind)

    def batches(self, dataset: Dataset) -> list[Batch]:
        """The whole dataset in micro-batches of similar lengths, for evaluation."""
        return [self.batch(dataset, group) for group in self.groups(dataset, by_length(dataset))]

    def groups(self, dataset: Dataset, indices: Sequence[int]) -> Window:
        """These examples in micro-batches, in their order where they are not packed."""
        return self._cut((tuple(indices),), dataset)

    def batch(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        *,
        device: torch.device | None = None,
        stage: Stage | None = None,
    ) -> Batch:
        """Some examples of a dataset as one micro-batch on the run's device (or another): padded, or in a row. `stage` is
        the way up to a GPU."""
        # Padding is neither attended to nor supervised, so any id does; a tokenizer's own may lie beyond the embedding.
        examples = [dataset.examples[i] for i in indices]
        found = collate(examples, pad_id=0, packed=bool(self.config.packing))
        choices = None
        if dataset.labels:
            n_targets = tuple(example.n_supervised for example in examples)
            choices = Choices(tuple(dataset.labels[i] for i in indices), n_targets, dataset.together)
        return make_batch(found, device or self.device, examples=indices, choices=choices, stage=stage)

    @property
    def n_micro_batches(self) -> int:
        """The micro-batches of a usual step (of this process' share of it); where sequences are packed, of the largest."""
        if self.config.packing:
            return len(self.workload.batches)
        return len(self.share(range(min(self.config.grad_accum, -(-self.train.n_units // self.config.batch_size)))))

    def share(self, micro_batches: Sequence[T]) -> Sequence[T]:
        """What of a step's micro-batches this process has: where ranks share it, rank 0's part."""
        return shares(micro_batches, self.config.ranks)[0]


def by_length(dataset: Dataset) -> tuple[int, ...]:
    """The examples of a dataset, the shortest first; those that belong together stay neighbours."""
    lengths = unit_lengths(dataset.lengths, dataset.together)
    return members(sorted(range(len(lengths)), key=lengths.__getitem__), dataset.together)
