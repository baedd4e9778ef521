"""The ops that other processes of the run take part in: boundaries along a pipeline, sums over ranks, and the agreement.

After one bad number anywhere no process updates anything: a fault is kept until all agree on it, since whoever left before
would let the others wait. What a step came to is brought to process 0 at its end. How things travel is run/link.py's and
run/ranks.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lopt_edge.errors import NotFinite
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Op
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.optim import SegmentOptimizer
from lopt_edge.run.step.step_state import StepState, enter_later, present

if TYPE_CHECKING:  # torch.distributed is for those who need it
    from lopt_edge.run.link import Link
    from lopt_edge.run.ranks import Exchange


class PeerOps:
    """The runners of these ops; `methods` has them by the kind of op, for the executor's table. `link` and `exchange` are
    there once the processes have met."""

    def __init__(self, model: Model, optimizer: SegmentOptimizer, *, check_finite: Callable[[StepState], None]) -> None:
        self.model, self.optimizer, self.check_finite = model, optimizer, check_finite
        self.link: Link | None = None
        self.exchange: Exchange | None = None  # of ranks
        self.methods: Mapping[Kind, Callable[[StepState, Op], None]] = {
            Kind.RECV: self._receive, Kind.SEND: self._send, Kind.AGREE: self._agree, Kind.REDUCE: self._reduce,
        }  # fmt: skip

    def _receive(self, state: StepState, op: Op) -> None:
        batch = state.batches[op.micro_batch]
        shape = (*batch.ids_BT.shape, self.model.facts.hidden_size)
        state.hidden_BTD = present(self.link).receive_boundary(shape, self.model.dtype, self.model.device)
        enter_later(self.model, state, batch)

    def _send(self, state: StepState, op: Op) -> None:
        present(self.link).send_boundary(present(state.hidden_BTD))

    def _agree(self, state: StepState, op: Op) -> None:
        """Agree with the other processes: after one bad number anywhere no process updates anything."""
        link = present(self.link)
        link.flush()
        if state.fault is None:
            try:
                self.check_finite(state)
            except NotFinite as error:
                state.fault, state.fault_op = error, op.text()
        link.agree(state.fault, state.fault_op)
        if state.plan.ranks > 1:  # each has a part of every loss; whoever is lost here has left all values as they were
            for other in link.gather({"losses": state.losses}):
                for segment, loss in other["losses"].items():
                    state.losses[int(segment)] = state.losses.get(int(segment), 0.0) + loss
        self.optimizer.checked = True

    def _reduce(self, state: StepState, op: Op) -> None:
        """Begin a sum over ranks; one that had no micro-batch gives zeros."""
        self.optimizer.accept_gradients(op.group, own_block=state.own_blocks)
        gradient = present(self.optimizer.groups[op.group].gradient).here()
        state.reducing[op.group] = present(self.exchange).begin(gradient)

    def wait_reduced(self, state: StepState, op: Op) -> None:
        """End a sum over ranks: the group's gradients are complete."""
        state.reducing.pop(op.group)()
        self.optimizer.complete_gradients(op.group)

    def exchange_results(self, state: StepState) -> None:
        """Bring the losses and norms of a pipeline's segments to process 0. Ranks have agreed on losses before their
        updates, and hold the same norms."""
        if self.link is None or state.plan.ranks > 1:
            return
        own, norms = state.plan.own_segments, self.optimizer.norms
        found = {
            "losses": {segment.index: state.losses[segment.index] for segment in own},
            "norms": {segment.index: norms.get(segment.index, 0.0) for segment in own},
        }
        for other in self.link.gather(found):
            state.losses.update({int(segment): loss for segment, loss in other["losses"].items()})
            norms.update({int(segment): norm for segment, norm in other["norms"].items()})
