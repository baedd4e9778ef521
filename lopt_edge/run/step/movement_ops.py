"""The ops that move things between tiers, one short method each: a movement begins with one and ends with its WAIT.

What moves where and when is written in the plan; how is run/tiers/moves.py's, run/tiers/weights.py's, run/tiers/graphs.py's
and optim.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lopt_edge.plan.schedule.effects import REDUCED, Kind
from lopt_edge.plan.schedule.ops import Op
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.optim import SegmentOptimizer
from lopt_edge.run.step.step_state import present
from lopt_edge.run.tiers.graphs import LayerGraph
from lopt_edge.run.tiers.moves import OffloadedTensor


class Held(Protocol):
    """The things of a step that can move, by (micro-batch, layer)."""

    inputs: dict[tuple[int, int], OffloadedTensor]
    graphs: dict[tuple[int, int], LayerGraph]


class MovementOps:
    """The runners of all movements; `methods` has them by the kind of op, for the executor's table."""

    def __init__(self, model: Model, optimizer: SegmentOptimizer, *, wait_reduced: Callable[[Any, Op], None]) -> None:
        self.wait_reduced = wait_reduced  # the end of a sum over ranks (peer_ops.py)
        self.model, self.optimizer, self.mover = model, optimizer, optimizer.mover
        self.methods: Mapping[Kind, Callable[[Held, Op], None]] = {
            Kind.FETCH: self._fetch, Kind.WAIT: self._wait, Kind.EVICT: self._evict, Kind.SPILL: self._spill,
            Kind.RESTORE: self._restore, Kind.PAGE_OUT: self._page_out, Kind.PAGE_IN: self._page_in,
            Kind.LOAD: self._load, Kind.STORE: self._store,
        }  # fmt: skip

    def _fetch(self, held: Held, op: Op) -> None:
        present(self.model.weights).fetch(op.target)

    def _evict(self, held: Held, op: Op) -> None:
        if op.item == "input":
            self.mover.drop(held.inputs[op.micro_batch, op.target])
        else:
            present(self.model.weights).evict(op.target)

    def _spill(self, held: Held, op: Op) -> None:
        self.mover.down(held.inputs[op.micro_batch, op.target], op.tier)

    def _restore(self, held: Held, op: Op) -> None:
        self.mover.up(held.inputs[op.micro_batch, op.target])

    def _page_out(self, held: Held, op: Op) -> None:
        held.graphs[op.micro_batch, op.target].page_out(op.tier)

    def _page_in(self, held: Held, op: Op) -> None:
        held.graphs[op.micro_batch, op.target].page_in()

    def _load(self, held: Held, op: Op) -> None:
        (self.optimizer.load_states if op.item == "states" else self.optimizer.load_gradients)(op.group)

    def _store(self, held: Held, op: Op) -> None:
        (self.optimizer.store_states if op.item == "states" else self.optimizer.store_gradients)(op.group, op.tier)

    def _wait(self, held: Held, op: Op) -> None:
        if op.item == "input":
            self.mover.wait(held.inputs[op.micro_batch, op.target])
        elif op.item == "pages":
            held.graphs[op.micro_batch, op.target].wait()
        elif op.item == "states":
            self.optimizer.wait_states(op.group)
        elif op.item == "gradients":
            self.optimizer.wait_gradients(op.group)
        elif op.item == REDUCED:
            self.wait_reduced(held, op)
        else:
            present(self.model.weights).wait(op.target)
