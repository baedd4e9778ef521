"""What is alive inside one training step, what is left of one that stopped between micro-batches, and what one came to.

The rule: everything that a step keeps is in its StepState, which is dropped with the step; nothing of it outlives a fault.
Who fills and frees it is executor.py. Shapes: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from lopt_edge.errors import NotFinite
from lopt_edge.plan.schedule.build import groups_of
from lopt_edge.plan.schedule.ops import GroupName, Plan
from lopt_edge.run.model.context import LayerContext
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch, Totals
from lopt_edge.run.tiers.graphs import LayerGraph
from lopt_edge.run.tiers.moves import OffloadedTensor

T = TypeVar("T")
Rates = Mapping[
    int | GroupName, float
]  # learning rates by segment; of groups that have one of their own (aux heads), by group
ALIGNED = -1  # among the losses by segment: that of an alignment beside the task
FIRST_MEASURED = -2  # among them, and downwards: the sums that are measured of preferences (preference_loss.py)


@dataclass(frozen=True)
class StepResult:
    """The losses of one optimizer step before their weights, and each segment's gradient norm (0 for a frozen one).

    `align_loss` is that of an alignment beside the task: minus the mean cosine of its tokens. `choices`: what was measured
    of preferences, by the names of metrics.jsonl.
    """

    loss: float
    local_loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    totals: Totals
    align_loss: float | None = None
    choices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SegmentGradient:
    """The gradient (B, T, D) of a segment's loss, the loss before its weight (a scalar on the device), and the sums of what
    is measured of preferences, by name."""

    grad_BTD: Tensor
    loss: Tensor
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cut:
    """A step between two micro-batches: the next one, the losses so far by segment (or ALIGNED), the accumulated gradients.

    Both are asked for, since a GPU's host waits for them. `gradient` gives a group's gradient as a flat fp32 tensor on the
    CPU, None for a group that has none.
    """

    micro_batch: int
    losses: Callable[[], Mapping[int, float]]
    gradient: Callable[[GroupName], Tensor | None]


@dataclass(frozen=True, eq=False)
class UnreadLoss:
    """A loss that lies on the device: of a segment (or ALIGNED), what a message calls it, and the op that computed it.

    `weight` is what its value was multiplied by.
    """

    segment: int
    name: str
    op: str
    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Share:
    """The part of a step that one rank has: `first` is the place of its first micro-batch in the window, whose totals these
    are."""

    first: int
    totals: Totals


@dataclass(eq=False)
class StepState:
    """All that is alive inside one step. `graphs` and `inputs` are keyed by (micro-batch, layer)."""

    plan: Plan
    batches: Sequence[Batch]
    totals: Totals
    learning_rates: Rates
    losses: dict[int, float]
    own_blocks: bool  # gradients move: each group's are a tensor of its own
    early: bool  # some STEP comes before the last BACKWARD
    hidden_BTD: Tensor | None = None
    layer_context: LayerContext | None = None
    held_BTD: Tensor | None = None  # what the micro-batch's next pass enters with
    target_BTD: Tensor | None = None  # the running segment's input, if it is no saved input
    grad_BTD: Tensor | None = None
    align_weight: float = 0.0
    teacher_BTD: Tensor | None = None
    aligned: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # gradients that wait for their BACKWARD
    cleaned: bool = False
    unread: list[UnreadLoss] = field(default_factory=list)
    fault: NotFinite | None = None  # among several processes: reported when the processes agree
    fault_op: str = ""
    key_gradients: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # wait for their layer
    reducing: dict[GroupName, Callable[[], None]] = field(default_factory=dict)  # sums over ranks: what waits for each
    inputs: dict[tuple[int, int], OffloadedTensor] = field(default_factory=dict)
    graphs: dict[tuple[int, int], LayerGraph] = field(default_factory=dict)


def present(value: T | None) -> T:
    """The value itself, which an earlier op of a sound plan has left. Raises RuntimeError for None: a defect of ours."""
    if value is None:
        raise RuntimeError("the op needs what no earlier op has left")
    return value


def segments_of(plan: Plan) -> dict[GroupName, int]:
    """The segment of each group that this step updates."""
    found = {group: segment.index for segment in plan.segments for group in groups_of(segment)}
    return found | {("layer", layer): segment.index for segment in plan.segments for layer in segment.through}


def enter_later(model: Model, state: StepState, batch: Batch) -> None:
    """Make the context of a micro-batch that begins with hidden states of a later layer."""
    hidden_BTD, lengths = present(state.hidden_BTD), batch.in_a_row
    state.layer_context = model.layer_context(hidden_BTD, batch.ids_BT, embedded=False, lengths=lengths)
