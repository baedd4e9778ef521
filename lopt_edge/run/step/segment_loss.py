"""What a LOSS op computes: a segment's loss and its gradient with respect to the segment's output, in tiles of tokens.

Which loss it is says the plan's segment (plan/schedule/segments.py); the formulas are in losses.py, those of preferences,
in the place of the task loss, in lopt_edge/objectives. Coefficients are 1 / totals of the accumulation window (design law
5); local losses are averaged, then weighted by lambda, and returned before that weight. The rule: nothing of one tile lives
on into the next. Aux heads' gradients are accumulated on the way; who owns them and where they lie is the executor's
business.

Shapes: B sequences, T tokens, N selected tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lopt_edge.errors import NotFinite
from lopt_edge.objectives import Objective
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.run.device import sum_dtype
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch, Totals
from lopt_edge.run.step.losses import ReconstructHead, alignment, task_loss
from lopt_edge.run.step.preference_loss import choice_gradient
from lopt_edge.run.step.step_state import SegmentGradient, StepState, present


@dataclass(frozen=True, eq=False)
class SegmentOutput:
    """A segment's output, and all that its loss needs beside it.

    `target_BTD` is what a reconstruction aims at, `teacher_BTD` what an alignment aims at; `tile` is in tokens.
    """

    segment: Segment
    n_local: int  # segments with a local loss in this kind of step; 0: theirs are not weighed by lambda
    batch: Batch
    totals: Totals
    hidden_BTD: Tensor
    target_BTD: Tensor | None
    teacher_BTD: Tensor | None
    tile: int


class SegmentLosses:
    """The losses of all segments of a model. `heads` are the aux heads by segment index, `local_weight` is lambda;
    `objective` is the task loss where that is one of preferences."""

    def __init__(
        self,
        model: Model,
        heads: Mapping[int, ReconstructHead],
        *,
        local_weight: float,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.heads, self.local_weight, self.objective = model, heads, local_weight, objective

    def gradient(self, output: SegmentOutput, *, loss_scale: float) -> SegmentGradient:
        """The gradient of the segment's loss times `loss_scale`, and the loss before its weight.

        The loss is added up and stays on the device, since a GPU's host waits for a number; in float64, where the sum of
        fp32 numbers has the bits of Python's. The gradients of aux heads are accumulated on the way.
        """
        if output.segment.loss == "task" and self.objective is not None:
            return choice_gradient(
                self.model,
                self.objective,
                output.hidden_BTD,
                output.batch,
                output.totals,
                tile=output.tile,
                loss_scale=loss_scale,
            )
        weighed = output.segment.is_local and output.n_local
        factor = loss_scale * (self.local_weight / output.n_local if weighed else 1.0)
        if output.segment.loss == "align":
            grad_BTD, total = aligned(output, scale=factor / output.totals.tokens)  # scaled before it is cast
            return SegmentGradient(grad_BTD, total / factor)
        rows_N = output.batch.supervised_N if output.segment.reads_out else output.batch.real_N
        flat_ND = output.hidden_BTD.flatten(0, 1)
        total = torch.zeros((), dtype=sum_dtype(flat_ND.device), device=flat_ND.device)
        grad_ND = torch.zeros_like(flat_ND)
        positions = torch.arange(len(flat_ND), device=flat_ND.device) if rows_N is None else rows_N
        for start in range(0, len(positions), output.tile):
            tile_N = positions[start : start + output.tile]
            grad_ND[tile_N], loss = self._tile(output, flat_ND[tile_N], tile_N, start=start, factor=factor)
            total += loss
        return SegmentGradient(grad_ND.view_as(output.hidden_BTD), total)

    def _tile(
        self, output: SegmentOutput, leaf_ND: Tensor, tile_N: Tensor, *, start: int, factor: float
    ) -> tuple[Tensor, Tensor]:
        """The gradient (N, D) of a tile, and its loss (fp32 scalar)."""
        segment = output.segment
        leaf_ND.requires_grad_()
        with torch.enable_grad():
            if segment.reads_out:
                tile, batch = slice(start, start + output.tile), output.batch
                loss = task_loss(self.model, leaf_ND, batch.targets_N[tile], host_targets_N=batch.host_targets(tile))
                denominator = max(1, output.totals.supervised)
            else:
                loss = self.heads[segment.index](leaf_ND, present(output.target_BTD).flatten(0, 1)[tile_N])
                denominator = output.totals.tokens * self.model.facts.hidden_size
            loss = loss * (1.0 / denominator)
            torch.autograd.backward(loss if factor == 1.0 else loss * factor)
        return present(leaf_ND.grad), loss.detach()


def aligned(output: SegmentOutput, *, scale: float) -> tuple[Tensor, Tensor]:
    """The gradient (B, T, D) of `scale` times minus the cosines of all real tokens to the teacher's, and that loss (a
    scalar on the device)."""
    hidden_ND, teacher_ND = output.hidden_BTD.flatten(0, 1), present(output.teacher_BTD).flatten(0, 1)
    total = torch.zeros((), dtype=sum_dtype(hidden_ND.device), device=hidden_ND.device)
    grad_ND, rows_N = torch.zeros_like(hidden_ND), output.batch.real_N
    positions = torch.arange(len(hidden_ND), device=hidden_ND.device) if rows_N is None else rows_N
    for start in range(0, len(positions), output.tile):
        tile_N = positions[start : start + output.tile]
        loss, grad_ND[tile_N] = alignment(hidden_ND[tile_N], teacher_ND[tile_N], scale=scale)
        total += loss
    return grad_ND.view_as(output.hidden_BTD), total


def name_of_loss(segment: Segment) -> str:
    """What a message calls the loss of a segment."""
    return "alignment" if segment.loss == "align" else "local" if segment.is_local else "task"


def take_losses(state: StepState, values: Sequence[float], *, alone: bool) -> None:
    """Add up the losses of a step that were read.

    Raises NotFinite for an infinite or NaN one; unless `alone`, in a pipeline, it is kept until all processes agree.
    """
    unread, state.unread = state.unread, []
    for loss, value in zip(unread, values, strict=True):
        if loss.weight:
            state.losses[loss.segment] = state.losses.get(loss.segment, 0.0) + value / loss.weight
        if math.isfinite(value):
            continue
        fault = NotFinite(f"the {loss.name} loss is not finite ({value}); nothing was updated", of_loss=True)
        if alone:
            raise fault
        if state.fault is None:
            state.fault, state.fault_op = fault, loss.op
