"""The executor: runs a plan, one short method per op. It decides nothing: what to keep and move, and when, the plan says.

Gradients flow by hand between layers: each layer's graph begins at its input and ends at its output, and
`BACKWARD i` hands the gradient of its input to `BACKWARD i - 1`. So no graph is ever longer than one layer, and the
first layer of a segment, whose input needs no gradient, computes none. An exception inside an op is re-raised with the
plan around it.

In float16 gradients are computed times a loss scale (a power of two, so it changes no bit of what does not under- or
overflow). If one overflows, the same step is run again with a quarter of the scale; no step is lost to it.

State lives in one `_Step` that is dropped with the step. Shapes: B sequences, T tokens, N selected tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lopt_edge.errors import PeerLost
from lopt_edge.plan.cuts import Movements, cut_before, movements_before
from lopt_edge.plan.knobs import TOKEN_TILES
from lopt_edge.plan.ops import ENTERS, Keep, Kind, Op, Plan
from lopt_edge.plan.segments import Segment
from lopt_edge.plan.step import groups_of
from lopt_edge.run.batches import Batch, Totals, window_totals
from lopt_edge.run.evaluation import evaluate
from lopt_edge.run.feature_cache import FeatureCache, rounded
from lopt_edge.run.graphs import LayerGraph
from lopt_edge.run.load import Frame, Model
from lopt_edge.run.losses import ReconstructHead, task_loss
from lopt_edge.run.moves import Parcel
from lopt_edge.run.op_faults import op_error
from lopt_edge.run.optim import GroupName, NotFinite, SegmentOptimizer

if TYPE_CHECKING:
    from lopt_edge.run.pipeline import FarGroups, Link

FLOAT16_SCALE = 2.0**16


@dataclass(frozen=True)
class StepResult:
    """Losses of one optimizer step, before their weights, and each segment's gradient norm (0 for a frozen one)."""

    loss: float
    local_loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    totals: Totals


@dataclass(frozen=True, eq=False)
class Cut:
    """A step between two micro-batches: the next one, the losses so far by segment, the accumulated gradients.

    `gradient` gives a group's as a flat fp32 tensor on the CPU, None for one that has none.
    """

    micro_batch: int
    losses: Mapping[int, float]
    gradient: Callable[[GroupName], Tensor | None]


@dataclass(eq=False)
class _Step:
    """What is alive inside one step. `graphs` and `inputs` are keyed by (micro-batch, layer)."""

    plan: Plan
    batches: Sequence[Batch]
    totals: Totals
    learning_rates: Mapping[int, float]
    losses: dict[int, float]
    own_blocks: bool  # gradients move: each group's are a tensor of its own
    early: bool  # some STEP comes before the last BACKWARD
    hidden_BTD: Tensor | None = None
    frame: Frame | None = None
    target_BTD: Tensor | None = None  # the running segment's input, if no saved input holds it
    grad_BTD: Tensor | None = None
    cleaned: bool = False
    fault: NotFinite | None = None  # in a pipeline: told when the processes agree
    fault_op: str = ""
    inputs: dict[tuple[int, int], Parcel] = field(default_factory=dict)
    graphs: dict[tuple[int, int], LayerGraph] = field(default_factory=dict)


def _segments_of(plan: Plan) -> dict[GroupName, int]:
    """The segment of each group that this step updates."""
    found = {group: segment.index for segment in plan.segments for group in groups_of(segment)}
    return found | {("layer", layer): segment.index for segment in plan.segments for layer in segment.through}


class Executor:
    """Runs plans on a model. `heads` are the aux heads by segment index. `observe` is called before and after each op."""

    def __init__(
        self,
        model: Model,
        *,
        heads: Mapping[int, ReconstructHead],
        optimizer: SegmentOptimizer,
        local_weight: float,
        loss_scale: float | None = None,
        observe: Callable[[Op, bool], None] | None = None,
    ) -> None:
        self.model, self.heads, self.optimizer, self.local_weight = model, heads, optimizer, local_weight
        self.mover, self.observe = optimizer.mover, observe
        self.link: Link | None = None  # to the other processes of a pipeline
        self.far: FarGroups | None = None  # what they hold, for checkpoints
        self.caches: dict[str, FeatureCache] = {}  # "boundary", "teacher": what READ and WRITE name
        self.state: _Step | None = None  # of the step under way, for those who observe
        self.loss_scale = loss_scale or (FLOAT16_SCALE if model.dtype == torch.float16 else 1.0)
        self.methods: dict[Kind, Callable[[_Step, Op], None]] = {
            Kind.EMBED: self._embed, Kind.FORWARD: self._forward, Kind.LOSS: self._loss, Kind.BACKWARD: self._backward,
            Kind.STEP: self._update, Kind.FETCH: self._fetch, Kind.WAIT: self._wait, Kind.EVICT: self._evict,
            Kind.SPILL: self._spill, Kind.RESTORE: self._restore, Kind.PAGE_OUT: self._page_out,
            Kind.PAGE_IN: self._page_in, Kind.LOAD: self._load, Kind.STORE: self._store, Kind.READ: self._read,
            Kind.WRITE: self._write, Kind.RECV: self._receive, Kind.SEND: self._send, Kind.AGREE: self._agree,
        }  # fmt: skip

    def run(
        self,
        plan: Plan,
        batches: Sequence[Batch],
        *,
        step: int,
        learning_rates: Mapping[int, float],
        start: Cut | None = None,
        between: Callable[[Cut], None] | None = None,
    ) -> StepResult:
        """One optimizer step. Raises RunError that shows the plan around the op that failed.

        `start`: go on from there. `between` is called before each micro-batch but the first; what it raises ends the step
        there, and the adapters are those of the last step.
        """
        while True:
            try:
                return self._run_once(plan, batches, step=step, learning_rates=learning_rates, start=start, between=between)
            except NotFinite as error:
                if self.loss_scale <= 1.0 or not error.untouched or error.of_loss:
                    raise
                self.loss_scale, start = max(1.0, self.loss_scale / 4), None

    def _run_once(
        self,
        plan: Plan,
        batches: Sequence[Batch],
        *,
        step: int,
        learning_rates: Mapping[int, float],
        start: Cut | None,
        between: Callable[[Cut], None] | None,
    ) -> StepResult:
        state = _Step(plan, batches, window_totals(batches), learning_rates, {s.index: 0.0 for s in plan.segments},
                      own_blocks=any(op.kind is Kind.STORE and op.item == "gradients" for op in plan.ops),
                      early=plan.has_early_steps)  # fmt: skip
        self.optimizer.begin_step(segments=_segments_of(plan), loss_scale=self.loss_scale)
        clock, self.state = self.model.clock, state
        clock.step, clock.active = step, True
        first = 0 if start is None else cut_before(plan, start.micro_batch)
        try:
            if start is not None:
                self._go_on(state, start, movements_before(plan, first))
            for position, op in enumerate(plan.ops[first:], start=first):
                if op.kind in ENTERS and op.item != "teacher" and between is not None and position > first:
                    self._pause(state, op, between)
                clock.micro_batch = op.micro_batch
                try:
                    self._run_op(state, op)
                except PeerLost:
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

    def _pause(self, state: _Step, op: Op, between: Callable[[Cut], None]) -> None:
        """Let the caller look at the step where nothing of a micro-batch is alive; not after early updates."""
        if op.micro_batch and not (state.inputs or state.graphs or self.optimizer.any_updated):
            between(Cut(op.micro_batch, dict(state.losses), self.optimizer.gradient_copy))

    def _go_on(self, state: _Step, start: Cut, movements: Movements) -> None:
        """Bring losses, gradients and streamed weights to where the ops before the cut left them."""
        state.losses.update(start.losses)
        for group in self.optimizer.groups:
            if (flat := start.gradient(group)) is not None:
                self.optimizer.put_gradient(group, flat, own_block=state.own_blocks)
                del flat
                for op in movements.of_gradients.get(group, ()):
                    self._run_op(state, op)
        for op in movements.of_weights:
            self._run_op(state, op)

    def _run_op(self, state: _Step, op: Op) -> None:
        if self.observe is not None:
            self.observe(op, False)
        self.methods[op.kind](state, op)
        if self.observe is not None:
            self.observe(op, True)

    def _clean_up(self, state: _Step) -> bool:
        """After a fault: nothing is held, nothing is on its way. Whether the values are those of the last step."""
        state.cleaned = True
        for parcel in state.inputs.values():
            self.mover.free(parcel)
        for graph in state.graphs.values():
            graph.free()
        self.optimizer.drop_gradients()
        if self.model.weights is not None:
            self.model.weights.evict_all()
        return self.optimizer.roll_back()

    def let_go(self) -> None:
        """No step follows: moments, gradients and the buffers of streamed layers go; the adapters stay."""
        self.optimizer.let_go()
        if self.model.weights is not None:
            self.model.weights.let_go()

    def _embed(self, state: _Step, op: Op) -> None:
        ids_BT = state.batches[op.micro_batch].ids_BT
        with torch.no_grad():
            state.hidden_BTD = self.model.embed(ids_BT)
            state.frame = self.model.frame(state.hidden_BTD)

    def _read(self, state: _Step, op: Op) -> None:
        batch = state.batches[op.micro_batch]
        state.hidden_BTD = self.caches[op.item].read(
            batch.examples, n_tokens=batch.ids_BT.shape[1], device=self.model.device, dtype=self.model.dtype
        )
        state.frame = self.model.frame(state.hidden_BTD)

    def _write(self, state: _Step, op: Op) -> None:
        state.hidden_BTD = rounded(state.hidden_BTD)
        self.caches[op.item].write(state.batches[op.micro_batch].examples, state.hidden_BTD)

    def _receive(self, state: _Step, op: Op) -> None:
        shape = (*state.batches[op.micro_batch].ids_BT.shape, self.model.facts.hidden_size)
        state.hidden_BTD = self.link.receive(shape, self.model.dtype, self.model.device)
        state.frame = self.model.frame(state.hidden_BTD)

    def _send(self, state: _Step, op: Op) -> None:
        self.link.send(state.hidden_BTD)

    def _agree(self, state: _Step, op: Op) -> None:
        """One bad number anywhere, and no process updates anything."""
        self.link.flush()
        if state.fault is None:
            try:
                self.optimizer.judge()
            except NotFinite as error:
                state.fault, state.fault_op = error, op.text()
        self.link.agree(state.fault, state.fault_op)
        self.optimizer.judged = True

    def _forward(self, state: _Step, op: Op) -> None:
        hidden_BTD, key = state.hidden_BTD, (op.micro_batch, op.target)
        segment = state.plan.segment_of(op.target)
        if op.target == segment.first:
            held_here = segment.has_head and op.keep in (Keep.GRAPH, Keep.PAGES)
            state.target_BTD = hidden_BTD if held_here else None
        if op.keep in (Keep.GRAPH, Keep.PAGES):
            state.hidden_BTD = None  # the graph holds what it needs
            graph = LayerGraph(self.mover, movable=op.keep is Keep.PAGES, constants=state.frame.tensors())
            state.graphs[key] = graph
            state.hidden_BTD = self._run_with_graph(state, op, graph, hidden_BTD, run=self.model.run_layer)
            return
        if op.keep is Keep.INPUT:
            state.inputs[key] = Parcel(hidden_BTD)
        with torch.no_grad():
            state.hidden_BTD = self.model.run_layer(op.target, hidden_BTD, state.frame)

    def _run_with_graph(
        self, state: _Step, op: Op, graph: LayerGraph, hidden_BTD: Tensor, *, run: Callable[[int, Tensor, Frame], Tensor]
    ) -> Tensor:
        """A layer's output; `graph` leads back to its input (not in a segment's first trained layer, where it ends)."""
        first = op.target == state.plan.segment_of(op.target).trained[0]
        with torch.enable_grad(), graph.recording():
            return graph.end(run(op.target, graph.begin(hidden_BTD, needs_gradient=not first), state.frame))

    def _loss(self, state: _Step, op: Op) -> None:
        """The segment's loss and its gradient with respect to the segment's output."""
        has_head = state.plan.segments[op.target].has_head
        if has_head:
            self._accept(state, ("aux", op.target))
        state.grad_BTD = self._tiled_loss(state, op, local=not state.plan.segments[op.target].reads_out)
        state.target_BTD = None
        if op.target == state.plan.own_segments[-1].index:
            state.hidden_BTD = None  # nothing runs on it any more
        if has_head:
            self._complete(state, op, ("aux", op.target))

    def _tiled_loss(self, state: _Step, op: Op, *, local: bool) -> Tensor:
        """In tiles of tokens; the gradient (B, T, D)."""
        batch, segment = state.batches[op.micro_batch], state.plan.segments[op.target]
        rows_N = batch.real_N if local else batch.supervised_N
        flat_ND = state.hidden_BTD.flatten(0, 1)
        grad_ND = torch.zeros_like(flat_ND)
        target_BTD = self._target(state, op, segment.first) if local else None
        positions = torch.arange(len(flat_ND), device=flat_ND.device) if rows_N is None else rows_N
        for start in range(0, len(positions), state.plan.tile):
            tile_N = positions[start : start + state.plan.tile]
            targets = target_BTD if local else batch.targets_N[start : start + state.plan.tile]
            grad_ND[tile_N] = self._tile_loss(state, op, flat_ND[tile_N], tile_N, targets)
        return grad_ND.view_as(state.hidden_BTD)

    def _tile_loss(self, state: _Step, op: Op, leaf_ND: Tensor, tile_N: Tensor, targets: Tensor) -> Tensor:
        """The gradient of a tile. A function of its own, so that nothing of one tile lives on into the next."""
        segment = state.plan.segments[op.target]
        leaf_ND.requires_grad_()
        with torch.enable_grad():
            if segment.reads_out:
                loss = task_loss(self.model, leaf_ND, targets)
            else:
                loss = self.heads[op.target](leaf_ND, targets.flatten(0, 1)[tile_N])
            loss = loss * (1.0 / self._denominator(state, segment))
            factor = self.loss_scale * (self._local_factor(state.plan) if segment.is_local else 1.0)
            (loss if factor == 1.0 else loss * factor).backward()
        value = loss.item()
        if not math.isfinite(value):
            which = "local" if segment.is_local else "task"
            error = NotFinite(f"the {which} loss is not finite ({value}); nothing was updated", of_loss=True)
            if self.link is None:
                raise error
            if state.fault is None:  # the others count on this process until all agree
                state.fault, state.fault_op = error, op.text()
        state.losses[op.target] += value
        return leaf_ND.grad

    def _target(self, state: _Step, op: Op, first_layer: int) -> Tensor:
        """What a local loss reconstructs: the segment's input."""
        saved = state.inputs.get((op.micro_batch, first_layer))
        return state.target_BTD if saved is None else saved.here()

    def _denominator(self, state: _Step, segment: Segment) -> int:
        if segment.reads_out:
            return max(1, state.totals.supervised)
        return state.totals.tokens * self.model.facts.hidden_size

    def _local_factor(self, plan: Plan) -> float:
        """lambda over the number of local losses: they are averaged, then weighted."""
        return self.local_weight / sum(segment.is_local for segment in plan.segments)

    def _backward(self, state: _Step, op: Op) -> None:
        key, group = (op.micro_batch, op.target), ("layer", op.target)
        graph = state.graphs.pop(key, None)
        if graph is None:
            graph, parcel = LayerGraph(self.mover), state.inputs.pop(key)
            hidden_BTD = parcel.here()
            self.mover.free(parcel)
            self._run_with_graph(state, op, graph, hidden_BTD, run=self.model.rerun_layer)
            del hidden_BTD
        try:
            self._accept(state, group)
            graph.feed(state.grad_BTD)
            state.grad_BTD = None
            state.grad_BTD = graph.backward()
        finally:
            graph.free()
        self._complete(state, op, group)

    def _accept(self, state: _Step, group: GroupName) -> None:
        self.optimizer.accept_gradients(group, own_block=state.own_blocks)

    def _complete(self, state: _Step, op: Op, group: GroupName) -> None:
        if op.micro_batch == state.plan.n_micro_batches - 1:
            self.optimizer.complete_gradients(group)

    def _update(self, state: _Step, op: Op) -> None:
        segment = op.target if op.unit == "aux" else state.plan.segment_of(op.target).index
        if op.unit == "layer" and op.target in state.plan.segments[segment].through:
            self._accept(state, op.group)  # no gradient came: a zero one, so that its momentum moves it
        self.optimizer.step(op.group, lr=state.learning_rates[segment], early=state.early)

    # movements: each begins here and ends in _wait -------------------------------------------------------------------

    def _fetch(self, state: _Step, op: Op) -> None:
        self.model.weights.fetch(op.target)

    def _evict(self, state: _Step, op: Op) -> None:
        if op.item == "input":
            self.mover.drop(state.inputs[op.micro_batch, op.target])
        else:
            self.model.weights.evict(op.target)

    def _spill(self, state: _Step, op: Op) -> None:
        self.mover.down(state.inputs[op.micro_batch, op.target], op.tier)

    def _restore(self, state: _Step, op: Op) -> None:
        self.mover.up(state.inputs[op.micro_batch, op.target])

    def _page_out(self, state: _Step, op: Op) -> None:
        state.graphs[op.micro_batch, op.target].page_out(op.tier)

    def _page_in(self, state: _Step, op: Op) -> None:
        state.graphs[op.micro_batch, op.target].page_in()

    def _load(self, state: _Step, op: Op) -> None:
        (self.optimizer.load_states if op.item == "states" else self.optimizer.load_gradients)(op.group)

    def _store(self, state: _Step, op: Op) -> None:
        (self.optimizer.store_states if op.item == "states" else self.optimizer.store_gradients)(op.group, op.tier)

    def _wait(self, state: _Step, op: Op) -> None:
        if op.item == "input":
            self.mover.wait(state.inputs[op.micro_batch, op.target])
        elif op.item == "pages":
            state.graphs[op.micro_batch, op.target].wait()
        elif op.item == "states":
            self.optimizer.wait_states(op.group)
        elif op.item == "gradients":
            self.optimizer.wait_gradients(op.group)
        else:
            self.model.weights.wait(op.target)

    def _result(self, state: _Step) -> StepResult:
        segments = state.plan.segments
        if self.link is not None:
            self._exchange(state, self.link)
        return StepResult(
            loss=state.losses[segments[-1].index],
            local_loss=tuple(state.losses[s.index] for s in segments if s.is_local),
            grad_norm=tuple(self.optimizer.norms.get(s.index, 0.0) for s in segments),
            totals=state.totals,
        )

    def _exchange(self, state: _Step, link: Link) -> None:
        """Losses and norms of all segments come to process 0."""
        own = state.plan.own_segments
        losses = {segment.index: state.losses[segment.index] for segment in own}
        norms = {segment.index: self.optimizer.norms.get(segment.index, 0.0) for segment in own}
        for other in link.gather({"losses": losses, "norms": norms}):
            state.losses.update({int(segment): loss for segment, loss in other["losses"].items()})
            self.optimizer.norms.update({int(segment): norm for segment, norm in other["norms"].items()})

    def evaluate(
        self, batches: Sequence[Batch], *, token_tile: int = TOKEN_TILES[0], between: Callable[[], None] = lambda: None
    ) -> float:
        """Mean task loss per supervised token, forward only, in tiles of so many tokens. `between`: before each batch."""
        return evaluate(self.model, batches, token_tile=token_tile, between=between, link=self.link)
