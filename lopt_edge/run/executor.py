"""The executor: runs a plan, one short method per op. It decides nothing; what to keep and when is written in the plan.

Gradients flow by hand between layers: each layer's graph begins at a detached input and ends at its output, and
`BACKWARD i` hands the gradient of its input to `BACKWARD i - 1`. So no graph is ever longer than one layer, and the
first layer of a segment, whose input needs no gradient, computes none. An exception inside an op is re-raised with the
plan around it.

In float16 gradients are computed times a loss scale (a power of two, so it changes no bit of what does not under- or
overflow). If one overflows, the same step is run again with a quarter of the scale; no step is lost to it.

State lives in one `_Step` that is dropped with the step. Shapes: B sequences, T tokens, N selected tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lopt_edge.errors import LoptError, RunError
from lopt_edge.plan.ops import Keep, Kind, Op, Plan
from lopt_edge.run.batches import Batch, Totals, window_totals
from lopt_edge.run.load import Frame, Model
from lopt_edge.run.losses import TOKEN_TILE, ReconstructHead, task_loss
from lopt_edge.run.optim import NotFinite, SegmentOptimizer

FLOAT16_SCALE = 2.0**16


@dataclass(frozen=True)
class StepResult:
    """Losses of one optimizer step, before their weights, and each segment's gradient norm (0 for a frozen one)."""

    loss: float
    local_loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    totals: Totals


@dataclass(eq=False)
class _Step:
    """What is alive inside one step. `graphs` and `inputs` are keyed by (micro-batch, layer)."""

    plan: Plan
    batches: Sequence[Batch]
    totals: Totals
    learning_rates: Mapping[int, float]
    losses: dict[int, float]
    hidden_BTD: Tensor | None = None
    frame: Frame | None = None
    target_BTD: Tensor | None = None  # the running segment's input
    grad_BTD: Tensor | None = None
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    measured: bool = False


class Executor:
    """Runs plans on a model. `heads` are the aux heads by segment index."""

    def __init__(
        self,
        model: Model,
        *,
        heads: Mapping[int, ReconstructHead],
        optimizer: SegmentOptimizer,
        local_weight: float,
        loss_scale: float | None = None,
    ) -> None:
        self.model, self.heads, self.optimizer, self.local_weight = model, heads, optimizer, local_weight
        self.loss_scale = loss_scale or (FLOAT16_SCALE if model.dtype == torch.float16 else 1.0)
        self.methods: dict[Kind, Callable[[_Step, Op], None]] = {
            Kind.EMBED: self._embed,
            Kind.FORWARD: self._forward,
            Kind.LOSS: self._loss,
            Kind.BACKWARD: self._backward,
            Kind.STEP: self._update,
        }

    def run(self, plan: Plan, batches: Sequence[Batch], *, step: int, learning_rates: Mapping[int, float]) -> StepResult:
        """One optimizer step. Raises RunError that shows the plan around the op that failed."""
        while True:
            try:
                return self._run_once(plan, batches, step=step, learning_rates=learning_rates)
            except NotFinite:
                if self.loss_scale <= 1.0:
                    raise
                self.loss_scale = max(1.0, self.loss_scale / 4)

    def _run_once(
        self, plan: Plan, batches: Sequence[Batch], *, step: int, learning_rates: Mapping[int, float]
    ) -> StepResult:
        state = _Step(plan, batches, window_totals(batches), learning_rates, {s.index: 0.0 for s in plan.segments})
        clock = self.model.clock
        clock.step, clock.active = step, True
        try:
            for position, op in enumerate(plan.ops):
                clock.micro_batch = op.micro_batch
                try:
                    self.methods[op.kind](state, op)
                except Exception as error:
                    self.optimizer.drop_gradients()
                    raise _op_error(plan, position, step, error) from error
        finally:
            clock.active = False
        return self._result(state)

    def _embed(self, state: _Step, op: Op) -> None:
        ids_BT = state.batches[op.micro_batch].ids_BT
        with torch.no_grad():
            state.hidden_BTD = self.model.embed(ids_BT)
            state.frame = self.model.frame(state.hidden_BTD)

    def _forward(self, state: _Step, op: Op) -> None:
        hidden_BTD = state.hidden_BTD
        segment = next(s for s in state.plan.segments if op.target in s.layers)
        if op.target == segment.first:
            state.target_BTD = hidden_BTD if segment.loss == "reconstruct" else None
        if op.keep is Keep.GRAPH:
            graph = self._run_with_graph(state, op.target, hidden_BTD, run=self.model.run_layer)
            state.graphs[op.micro_batch, op.target] = graph
            state.hidden_BTD = graph[1].detach()
            return
        if op.keep is Keep.INPUT:
            state.inputs[op.micro_batch, op.target] = hidden_BTD
        with torch.no_grad():
            state.hidden_BTD = self.model.run_layer(op.target, hidden_BTD, state.frame)

    def _run_with_graph(
        self, state: _Step, layer: int, hidden_BTD: Tensor, *, run: Callable[[int, Tensor, Frame], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(input leaf, output) of a layer; the segment's first input is frozen and asks for no gradient."""
        first = any(layer == segment.first for segment in state.plan.segments)
        leaf_BTD = hidden_BTD.detach().requires_grad_(not first)
        with torch.enable_grad():
            return leaf_BTD, run(layer, leaf_BTD, state.frame)

    def _loss(self, state: _Step, op: Op) -> None:
        """The segment's loss and its gradient with respect to the segment's output, in tiles of tokens."""
        batch, segment = state.batches[op.micro_batch], state.plan.segments[op.target]
        task = segment.loss == "task"
        rows_N = batch.supervised_N if task else batch.real_N
        flat_ND = state.hidden_BTD.flatten(0, 1)
        grad_ND = torch.zeros_like(flat_ND)
        positions = torch.arange(len(flat_ND), device=flat_ND.device) if rows_N is None else rows_N
        for start in range(0, len(positions), TOKEN_TILE):
            tile_N = positions[start : start + TOKEN_TILE]
            leaf_ND = flat_ND[tile_N].requires_grad_()
            with torch.enable_grad():
                if task:
                    loss = task_loss(self.model, leaf_ND, batch.targets_N[start : start + TOKEN_TILE])
                else:
                    loss = self.heads[op.target](leaf_ND, state.target_BTD.flatten(0, 1)[tile_N])
                loss = loss * (1.0 / self._denominator(state, task=task))
                factor = self.loss_scale * (1.0 if task else self._local_factor(state.plan))
                (loss if factor == 1.0 else loss * factor).backward()
            grad_ND[tile_N] = leaf_ND.grad
            state.losses[op.target] += loss.item()
        state.grad_BTD, state.target_BTD = grad_ND.view_as(state.hidden_BTD), None

    def _denominator(self, state: _Step, *, task: bool) -> int:
        if task:
            return max(1, state.totals.supervised)
        return state.totals.tokens * self.model.facts.hidden_size

    def _local_factor(self, plan: Plan) -> float:
        """lambda over the number of local losses: they are averaged, then weighted."""
        return self.local_weight / sum(segment.loss == "reconstruct" for segment in plan.segments)

    def _backward(self, state: _Step, op: Op) -> None:
        key = (op.micro_batch, op.target)
        graph = state.graphs.pop(key, None)
        if graph is None:
            graph = self._run_with_graph(state, op.target, state.inputs.pop(key), run=self.model.rerun_layer)
        leaf_BTD, output_BTD = graph
        output_BTD.backward(state.grad_BTD)
        state.grad_BTD = leaf_BTD.grad

    def _update(self, state: _Step, op: Op) -> None:
        if not state.measured:
            self.optimizer.measure(loss_scale=self.loss_scale)
            state.measured = True
        self.optimizer.step(op.target, lr=state.learning_rates[op.target])

    def _result(self, state: _Step) -> StepResult:
        segments = state.plan.segments
        return StepResult(
            loss=state.losses[segments[-1].index],
            local_loss=tuple(state.losses[s.index] for s in segments if s.loss == "reconstruct"),
            grad_norm=tuple(self.optimizer.norms.get(s.index, 0.0) for s in segments),
            totals=state.totals,
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean task loss per supervised token, forward only."""
        total, n_supervised = 0.0, 0
        for batch in batches:
            hidden_BTD = self.model.embed(batch.ids_BT)
            frame = self.model.frame(hidden_BTD)
            for layer in range(self.model.facts.n_layers):
                hidden_BTD = self.model.run_layer(layer, hidden_BTD, frame)
            selected_ND = hidden_BTD.flatten(0, 1)[batch.supervised_N]
            for start in range(0, len(selected_ND), TOKEN_TILE):
                tile = slice(start, start + TOKEN_TILE)
                total += task_loss(self.model, selected_ND[tile], batch.targets_N[tile]).item()
            n_supervised += batch.n_supervised
        return total / max(1, n_supervised)


def _op_error(plan: Plan, position: int, step: int, error: Exception) -> LoptError:
    where = f"step {step}, op {position} ({plan.ops[position].text()})"
    advice = "lower --max-seq-len or --batch-size" if isinstance(error, MemoryError | torch.OutOfMemoryError) else ""
    reason = str(error) if isinstance(error, LoptError) else f"{type(error).__name__}: {error}"
    kind = NotFinite if isinstance(error, NotFinite) else RunError
    return kind(f"{reason}\nThe plan around it:\n{plan.around(position)}", where=where, fix=advice)
