"""The executor: it runs a plan, one method per op. It decides nothing: what to keep and move, and when, the plan says.

Gradients flow by hand between layers: each layer's graph begins at its input and ends at its output, and
`BACKWARD i` hands the gradient of its input to `BACKWARD i - 1`. So no graph is ever longer than one layer, and the
first layer of a segment, whose input needs no gradient, computes none. An exception inside an op is re-raised with the
plan around it.

In float16 gradients are computed times a loss scale (a power of two, so it changes no bit of what does not under- or
overflow). If one overflows, the same step is run again with a quarter of the scale; no step is lost to it. After an early
update in the step it cannot be run again: the caller goes back to a checkpoint (training/run.py).

A step may be left and taken up again between two micro-batches (`Cut`). What a loss computes is segment_loss.py's matter,
movements between tiers are movement_ops.py's, what other processes take part in peer_ops.py's. State lives in one
`StepState` (step_state.py), dropped with the step. Shapes: B sequences, T tokens, N selected tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import record_function

from lopt_edge.errors import NotFinite, PeerLost
from lopt_edge.objectives import Objective
from lopt_edge.plan.schedule.cuts import Movements, cut_before, movements_before
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import GroupName, Keep, Op, Plan
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.run.device import device_of
from lopt_edge.run.model.averages import Averages
from lopt_edge.run.model.context import LayerContext
from lopt_edge.run.model.load import Model
from lopt_edge.run.step import key_sharing
from lopt_edge.run.step.batches import Batch, window_totals
from lopt_edge.run.step.losses import ReconstructHead
from lopt_edge.run.step.movement_ops import MovementOps
from lopt_edge.run.step.op_faults import op_error
from lopt_edge.run.step.optim import SegmentOptimizer
from lopt_edge.run.step.peer_ops import PeerOps
from lopt_edge.run.step.preference_loss import add_measured, measured_means
from lopt_edge.run.step.segment_loss import SegmentLosses, SegmentOutput, aligned, name_of_loss, take_losses
from lopt_edge.run.step.step_state import (
    ALIGNED,
    Cut,
    Rates,
    Share,
    StepResult,
    StepState,
    UnreadLoss,
    enter_later,
    present,
    segments_of,
)
from lopt_edge.run.tiers.feature_cache import FeatureCache
from lopt_edge.run.tiers.graphs import LayerGraph
from lopt_edge.run.tiers.moves import OffloadedTensor

if TYPE_CHECKING:
    from lopt_edge.run.link import FarGroups, Link

Observer = Callable[[Op, bool], None]  # (op, whether it is over)
FLOAT16_SCALE, SCALE_CUT = 2.0**16, 4  # at first; by how much an overflow lowers it


class Executor:
    """The runner of plans on a model. `heads` are the aux heads by segment index. Observers see each op begin and end."""

    def __init__(
        self,
        model: Model,
        *,
        heads: Mapping[int, ReconstructHead],
        optimizer: SegmentOptimizer,
        local_weight: float,
        averages: Averages | None = None,
        cascade_weight: float = 1.0,
        loss_scale: float | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.losses = SegmentLosses(model, heads, local_weight=local_weight, objective=objective)
        self.averages, self.cascade_weight = averages, cascade_weight  # of windows: what reaches the segment before
        self.mover = optimizer.mover
        self.observers: list[Observer] = []
        self.peers = PeerOps(model, optimizer, check_finite=self._check_finite)
        self.far: FarGroups | None = None  # their tensors, for checkpoints
        self.caches: dict[str, FeatureCache] = {}  # "boundary", "teacher": what READ and WRITE name
        self.state: StepState | None = None  # of the step under way, for those who observe
        self.loss_scale = loss_scale or (FLOAT16_SCALE if model.dtype == torch.float16 else 1.0)
        self.methods: dict[Kind, Callable[[StepState, Op], None]] = {
            Kind.EMBED: self._embed, Kind.FORWARD: self._forward, Kind.LOSS: self._loss, Kind.BACKWARD: self._backward,
            Kind.STEP: self._update, Kind.READ: self._read, Kind.WRITE: self._write, Kind.ALIGN: self._align,
            Kind.HOLD: self._hold, Kind.AVERAGE: self._average, **self.peers.methods,
            **MovementOps(model, optimizer, wait_reduced=self.peers.wait_reduced).methods,
        }  # fmt: skip

    @property
    def link(self) -> Link | None:
        """The link to the other processes of the run, a pipeline's or ranks; None where there are none."""
        return self.peers.link

    @link.setter
    def link(self, link: Link | None) -> None:
        self.peers.link = link

    def run(
        self,
        plan: Plan,
        batches: Sequence[Batch],
        *,
        step: int,
        learning_rates: Rates,
        align_weight: float = 0.0,
        start: Cut | None = None,
        between: Callable[[Cut], None] | None = None,
        share: Share | None = None,
    ) -> StepResult:
        """Run one optimizer step. Raises RunError, which shows the plan around the op that failed.

        `learning_rates` are by segment index (of an aux head by its group, if it has its own), `align_weight` is that of
        ALIGN ops, and `start` is a cut to go on from. `between` is called before each micro-batch but the first; what it
        raises ends the step there, and the adapters are those of the last step. `share`: which part of a step these batches
        are, where ranks share it; the losses are then this rank's part, in rank 0 those of all. In float16 the step is run
        again with a smaller loss scale if a gradient overflows.
        """
        while True:
            try:
                return self._run_once(
                    plan,
                    batches,
                    step=step,
                    learning_rates=learning_rates,
                    align_weight=align_weight,
                    start=start,
                    between=between,
                    share=share or Share(0, window_totals(batches)),
                )
            except NotFinite as error:
                if self.loss_scale <= 1.0 or not error.untouched or error.of_loss:
                    raise
                self.loss_scale, start = max(1.0, self.loss_scale / SCALE_CUT), None

    def _run_once(
        self,
        plan: Plan,
        batches: Sequence[Batch],
        *,
        step: int,
        learning_rates: Rates,
        align_weight: float,
        start: Cut | None,
        between: Callable[[Cut], None] | None,
        share: Share,
    ) -> StepResult:
        state = StepState(
            plan,
            batches,
            share.totals,
            learning_rates,
            {s.index: 0.0 for s in plan.segments},
            own_blocks=any(op.kind is Kind.STORE and op.item == "gradients" for op in plan.ops),
            early=plan.has_early_steps,
            align_weight=align_weight,
        )
        self.optimizer.begin_step(segments=segments_of(plan), loss_scale=self.loss_scale, closed=plan.closed)
        clock, self.state = self.model.clock, state
        clock.step, clock.active = step, True
        first = 0 if start is None else cut_before(plan, start.micro_batch)
        try:
            if start is not None:
                self._go_on(state, start, movements_before(plan, first))
            for position, op in enumerate(plan.ops[first:], start=first):
                if op.effect.enters and between is not None and position > first:
                    self._pause(state, op, between)
                clock.micro_batch = share.first + op.micro_batch
                try:
                    self._run_op(state, op)
                except PeerLost as error:
                    error.values_intact = not self.optimizer.any_updated
                    raise
                except Exception as error:
                    intact = self._clean_up(state)
                    raise op_error(plan, position, step, error, intact=intact) from error
        except BaseException:
            if not state.cleaned:
                self._clean_up(state)
            raise
        finally:
            clock.active, self.state = False, None
        return self._result(state)

    def _pause(self, state: StepState, op: Op, between: Callable[[Cut], None]) -> None:
        """Let the caller look at the step where nothing of a micro-batch is alive; not after early updates."""
        begins = state.plan.ops[cut_before(state.plan, op.micro_batch)].pass_index == op.pass_index
        if op.micro_batch and begins and not (state.inputs or state.graphs or self.optimizer.any_updated):

            def losses() -> dict[int, float]:
                self._read_losses(state)
                return dict(state.losses)

            between(Cut(op.micro_batch, losses, self.optimizer.gradient_copy))

    def _go_on(self, state: StepState, start: Cut, movements: Movements) -> None:
        """Bring losses, gradients and streamed weights to where the ops before the cut left them."""
        state.losses.update(start.losses())
        for group in self.optimizer.groups:
            if (flat := start.gradient(group)) is not None:
                self.optimizer.put_gradient(group, flat, own_block=state.own_blocks)
                del flat
                for op in movements.of_gradients.get(group, ()):
                    self._run_op(state, op)
        for op in movements.of_weights:
            self._run_op(state, op)

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """A context in which `observer` is called before and after each op, beside the other observers."""
        self.observers.append(observer)
        try:
            yield
        finally:
            self.observers.remove(observer)

    def _run_op(self, state: StepState, op: Op) -> None:
        for observer in self.observers:
            observer(op, False)
        with record_function(op.text()):  # what torch.profiler shows
            self.methods[op.kind](state, op)
        for observer in self.observers:
            observer(op, True)

    def _clean_up(self, state: StepState) -> bool:
        """Let all that the step keeps go, after a fault. Returns whether the values are those of the last step."""
        state.cleaned = True
        for offloaded in state.inputs.values():
            self.mover.free(offloaded)
        for graph in state.graphs.values():
            graph.free()
        self.optimizer.drop_gradients()
        if self.model.weights is not None:
            self.model.weights.evict_all()
        return self.optimizer.roll_back()

    def release(self) -> None:
        """Let moments, gradients and the buffers of streamed layers go, since no step follows; the adapters stay."""
        self.optimizer.release()
        if self.model.weights is not None:
            self.model.weights.release()

    def _embed(self, state: StepState, op: Op) -> None:
        batch = state.batches[op.micro_batch]
        with torch.no_grad():
            state.hidden_BTD = self.model.embed(batch.ids_BT)
            state.layer_context = self.model.layer_context(state.hidden_BTD, batch.ids_BT, lengths=batch.in_a_row)

    def _hold(self, state: StepState, op: Op) -> None:
        state.held_BTD = state.hidden_BTD

    def _read(self, state: StepState, op: Op) -> None:
        if op.item == "held":
            state.hidden_BTD, state.held_BTD = state.held_BTD, None
            return
        batch = state.batches[op.micro_batch]
        found_BTD = self._cached(op.item, batch)
        if op.item == "teacher":
            state.teacher_BTD = found_BTD
            return
        state.hidden_BTD = found_BTD
        enter_later(self.model, state, batch)

    def _cached(self, name: str, batch: Batch) -> Tensor:
        """The hidden states of a micro-batch from a cache."""
        read = partial(self.caches[name].read, device=self.model.device, dtype=self.model.dtype, stage=self.mover.stage)
        return read(batch.examples, n_tokens=batch.ids_BT.shape[1], packed=batch.packed)

    def _write(self, state: StepState, op: Op) -> None:
        """Write to the cache and go on with what it gives back, so that this step equals one that reads, bit for bit."""
        batch, cache = state.batches[op.micro_batch], self.caches[op.item]
        cache.write(batch.examples, present(state.hidden_BTD), packed=batch.packed)
        state.hidden_BTD = self._cached(op.item, batch)

    def _align(self, state: StepState, op: Op) -> None:
        segment = state.plan.segment_of(op.target)
        weight = state.align_weight * self.loss_scale
        output, scale = self._output(state, op, segment), weight / state.totals.tokens
        state.aligned[op.micro_batch, op.target], value = aligned(output, scale=scale)
        self._note_loss(state, UnreadLoss(ALIGNED, "alignment", op.text(), value, weight))
        state.teacher_BTD = None

    def _forward(self, state: StepState, op: Op) -> None:
        hidden_BTD, key = present(state.hidden_BTD), (op.micro_batch, op.target)
        segment = state.plan.scope(op)
        if op.target == segment.first:
            held_here = segment.has_head and op.keep in (Keep.GRAPH, Keep.PAGES)
            state.target_BTD = hidden_BTD if held_here else None
        if op.keep in (Keep.GRAPH, Keep.PAGES):
            state.hidden_BTD = None  # the graph keeps what it needs
            frozen = [one for one in self.model.layers[op.target].parameters() if not one.requires_grad]
            constants = [*present(state.layer_context).tensors(), *frozen]  # a router saves a view of its own
            graph = LayerGraph(self.mover, movable=op.keep is Keep.PAGES, constants=constants)
            state.graphs[key] = graph
            state.hidden_BTD = self._run_with_graph(state, op, graph, hidden_BTD, run=self.model.run_layer)
            return
        if op.keep is Keep.INPUT:
            state.inputs[key] = OffloadedTensor(hidden_BTD)
        with torch.no_grad(), self._adapters(op):
            state.hidden_BTD = self.model.run_layer(op.target, hidden_BTD, present(state.layer_context))

    def _run_with_graph(
        self,
        state: StepState,
        op: Op,
        graph: LayerGraph,
        hidden_BTD: Tensor,
        *,
        run: Callable[[int, Tensor, LayerContext], Tensor],
    ) -> Tensor:
        """A layer's output; `graph` leads back to its input (not in a segment's first trained layer, where it ends)."""
        first, context = op.target == state.plan.scope(op).reached[0], present(state.layer_context)
        with torch.enable_grad(), graph.recording(), self._adapters(op):
            begun_BTD = graph.begin(hidden_BTD, needs_gradient=not first)
            within = partial(run, op.target, begun_BTD)
            return key_sharing.run_in_graph(self.model, state, op, graph, within, context)

    def _adapters(self, op: Op) -> AbstractContextManager[None]:
        """The adapter set that the op computes with, in its layer."""
        return nullcontext() if op.adapters == "train" or self.averages is None else self.averages.used(op.target)

    def _loss(self, state: StepState, op: Op) -> None:
        """Compute the segment's loss and its gradient with respect to the segment's output."""
        segment = state.plan.segments[op.target]
        if segment.has_head:
            self._accept(state, ("aux", op.target))
        self._take_gradient(state, op, segment)
        state.target_BTD = None
        if state.plan.is_last_run(op):
            state.hidden_BTD = state.teacher_BTD = None  # nothing runs on them any more
        if segment.has_head and state.plan.ranks == 1 and op.micro_batch == state.plan.n_micro_batches - 1:
            self.optimizer.complete_gradients(("aux", op.target))

    def _take_gradient(self, state: StepState, op: Op, segment: Segment) -> None:
        """Compute a loss, in a function of its own: nothing of it may live on while a head's gradients complete."""
        found = self.losses.gradient(self._output(state, op, segment), loss_scale=self.loss_scale)
        state.grad_BTD = found.grad_BTD
        self._note_loss(state, UnreadLoss(op.target, name_of_loss(segment), op.text(), found.loss))
        add_measured(state.losses, found.measured)

    def _note_loss(self, state: StepState, loss: UnreadLoss) -> None:
        """Keep a loss, to be read with the norms; on cores it is read now, so that a bad one ends the step here."""
        state.unread.append(loss)
        if device_of(self.model.device).kind.computes_on_cores:
            self._read_losses(state)

    def _read_losses(self, state: StepState) -> None:
        values = torch.stack([loss.value for loss in state.unread]).cpu().tolist() if state.unread else []
        take_losses(state, values, alone=self.link is None)

    def _check_finite(self, state: StepState) -> None:
        """Read all losses and norms at once. Raises NotFinite, of a loss before that of a gradient."""
        told = partial(take_losses, state, alone=self.link is None)
        self.optimizer.check_finite([loss.value for loss in state.unread], told=told)

    def _output(self, state: StepState, op: Op, segment: Segment) -> SegmentOutput:
        return SegmentOutput(
            segment,
            0 if state.plan.overlaps else sum(other.is_local for other in state.plan.segments),
            state.batches[op.micro_batch],
            state.totals,
            present(state.hidden_BTD),
            self._target(state, op, segment.first) if segment.has_head else None,
            state.teacher_BTD,
            state.plan.tile,
        )

    def _target(self, state: StepState, op: Op, first_layer: int) -> Tensor:
        """The segment's input, which its local loss reconstructs."""
        saved = state.inputs.get((op.micro_batch, first_layer))
        return present(state.target_BTD) if saved is None else saved.here()

    def _backward(self, state: StepState, op: Op) -> None:
        key, group = (op.micro_batch, op.target), ("layer", op.target)
        graph = state.graphs.pop(key, None)
        if graph is None:
            graph, offloaded = LayerGraph(self.mover), state.inputs.pop(key)
            hidden_BTD = offloaded.here()
            self.mover.free(offloaded)
            self._run_with_graph(state, op, graph, hidden_BTD, run=self.model.rerun_layer)
            del hidden_BTD
        try:
            if op.adapters == "train":
                self._accept(state, group)
            if key in state.aligned:
                state.grad_BTD = state.aligned.pop(key).add_(present(state.grad_BTD))
            graph.feed(present(state.grad_BTD), state.key_gradients.pop(key, ()))
            state.grad_BTD = None
            with self._adapters(op):
                state.grad_BTD = graph.backward()
            key_sharing.take_gradients(self.model, state, op, graph)
        finally:
            graph.free()
        if state.plan.completes(op):
            self.optimizer.complete_gradients(group)
        segment = state.plan.scope(op)
        if op.target == segment.first and segment.begin < segment.first and self.cascade_weight != 1.0:
            present(state.grad_BTD).mul_(self.cascade_weight)  # it crosses to the segment before

    def _accept(self, state: StepState, group: GroupName) -> None:
        self.optimizer.accept_gradients(group, own_block=state.own_blocks)

    def _update(self, state: StepState, op: Op) -> None:
        segment = op.target if op.unit == "aux" else state.plan.segment_of(op.target).index
        if op.unit == "layer" and op.target in state.plan.segments[segment].through:
            self._accept(state, op.group)  # no gradient came: a zero one, so that its momentum moves it
        if state.unread:
            self._check_finite(state)
            self.optimizer.checked = not state.early
        rates = state.learning_rates
        self.optimizer.step(op.group, lr=rates[op.group if op.group in rates else segment], early=state.early)

    def _average(self, state: StepState, op: Op) -> None:
        present(self.averages).take(op.target, self.optimizer.groups["layer", op.target].values)

    def _result(self, state: StepState) -> StepResult:
        segments = state.plan.segments
        self._read_losses(state)
        self.peers.exchange_results(state)
        return StepResult(
            loss=state.losses[segments[-1].index],
            local_loss=tuple(state.losses[s.index] for s in segments if s.is_local),
            grad_norm=tuple(self.optimizer.norms.get(s.index, 0.0) for s in segments),
            totals=state.totals,
            align_loss=state.losses.get(ALIGNED),
            choices=measured_means(state.losses, self.losses.objective),
        )
