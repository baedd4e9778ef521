"""The search for the op where numbers stopped being finite: the same step is run again, and what each op leaves is checked.

A step is a function of its inputs, so the second run fails as the first did, and the adapters stay as they are: it is left
before its first update even if it should be finite this time (steps with early updates are not diagnosed). It costs one
more step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lopt_edge.errors import NotFinite, RunError
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Op, Plan
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.step_state import Rates


class _Enough(Exception):
    """Raised when the step comes to its updates, which must not be done again."""


def first_not_finite(
    executor: Executor,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    step: int,
    learning_rates: Rates,
    align_weight: float = 0.0,
) -> str:
    """The text of the first op that leaves a NaN or an infinity in hidden states, loss or gradients; "" if none does."""
    found: list[str] = []

    def observe(op: Op, after: bool) -> None:
        if op.kind is Kind.STEP:
            executor.optimizer.check_finite()
            raise _Enough
        if after and not found and not all(_finite(tensor) for tensor in _left_by(executor, op)):
            found.append(op.text())

    try:
        with executor.observed(observe):
            executor.run(plan, batches, step=step, learning_rates=learning_rates, align_weight=align_weight)
    except NotFinite as error:
        found.append(error.op)
    except RunError as error:
        if not isinstance(error.__cause__, _Enough):
            raise
    return found[0] if found else ""


def _left_by(executor: Executor, op: Op) -> list[Tensor | None]:
    """The tensors of this step that the op's row says that it makes."""
    state, plan = executor.state, executor.state and executor.state.plan
    if state is None or plan is None:
        return []
    found: list[Tensor | None] = []
    for thing in op.effect.makes:
        if thing.name == "aligned":
            found.append(state.aligned.get((op.micro_batch, op.target)))
        elif thing.name == "gradients" and op.effect.trains == "layer":
            found.append(_gradient(executor, ("layer", op.target)))
        elif thing.per == "step":  # what of the step is a tensor has the thing's name there
            found.append(getattr(state, f"{thing.name}_BTD", None))
    return found


def _gradient(executor: Executor, group: tuple[str, int]) -> Tensor | None:
    gradient = executor.optimizer.groups[group].gradient
    return None if gradient is None else gradient.tensor


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())
