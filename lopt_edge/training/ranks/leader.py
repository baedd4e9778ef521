"""Rank 0's side of a run whose steps several processes share: it is the run, and the others do what it asks for.

Rank 0 reads the data, plans, keeps the clock, the log, the checkpoints and the signals. It deals each window's
micro-batches (plan/schedule/ranks.py) and sends every rank its share, its plan (as text, once), the totals of the whole
window and the learning rates; held-out batches are dealt, too, and their losses added in the order in which one process
adds them. All ranks hold the same adapters and moments, so a checkpoint is rank 0's alone, and goes on with any number of
ranks.

The rules: what is decided (early ends, skipped steps, callbacks) is decided here; a signal that another rank heard comes
with its report, and stops the run as rank 0's own; a rank that is lost ends the run, with a checkpoint of the last whole
step. A stop waits for the step's end, since ranks have micro-batches in several places at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lopt_edge.errors import NotFinite, PeerLost, RunError
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.plan.schedule.ranks import Rank, shares
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch, as_message, window_totals
from lopt_edge.run.step.evaluation import batch_losses
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.step_state import Cut, Rates, Share, StepResult
from lopt_edge.training.pipeline.launch import BEGIN
from lopt_edge.training.pipeline.peers import Peers, started

if TYPE_CHECKING:
    from lopt_edge.plan.schedule.build import StepKind
    from lopt_edge.run.link import Link
    from lopt_edge.run.ranks import Exchange
    from lopt_edge.training.checkpoint.resume import Start
    from lopt_edge.training.prepare.inputs import Inputs

FOLLOW = f"{BEGIN}from lopt_edge.training.ranks.replica import main; main()"
MOST_KNOWN = 64  # plans that a rank keeps


@contextmanager
def open_leader(
    inputs: Inputs, start: Start | None, *, report: Callable[[], dict[str, int]], heard: Callable[[int], None]
) -> Iterator[Leader | None]:
    """The leader of the other ranks, which are started and know what the run is; None where one process has all.

    `report` gives this process' peaks, in bytes by name; `heard` takes the number of a signal that another rank got.
    """
    n = inputs.config.ranks
    if n == 1:
        yield None
        return
    ranks, timeout = [Rank(rank) for rank in range(n)], timedelta(minutes=inputs.config.pipeline_minutes)
    with started(ranks, follow=FOLLOW, timeout=timeout, whole="") as peers:
        leader = Leader(inputs, peers, peers.meet(_setup(inputs, start), report=report), heard)
        try:
            yield leader
        except PeerLost as error:
            raise leader.explained(error) from None
        finally:
            leader.close()


def _setup(inputs: Inputs, start: Start | None) -> dict[str, Any]:
    """The facts that the others need to know, as JSON values."""
    config, n, predicted = inputs.config, inputs.config.ranks, inputs.predict()
    folder = None if start is None else str(start.checkpoint.folder)
    return {
        "config": config.model_dump(mode="json"),
        "knobs": asdict(inputs.knobs),
        "adapter": folder or config.init_adapter,
        "resumed": folder,
        "disk_bytes": [predicted.disk_bytes] * n,
        "journal_bytes": [predicted.journal_bytes] * n,
        "trim_bytes": [predicted.trim_bytes] * n,
        "mmap_bytes": inputs.workload.mmap_bytes(inputs.knobs),
        "budget_bytes": inputs.budget.device_bytes if inputs.run_plan.fits else None,
        "context_bytes": 0 if inputs.workload.shape.kind.counts_process else inputs.workload.library_bytes,
        "device": inputs.device.type,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),  # as here: products of several threads are summed in another order
    }


@contextmanager
def _between_steps() -> Iterator[None]:
    """A context in which a rank may be lost, and the values here stay those of the last step."""
    try:
        yield
    except PeerLost as error:
        error.values_intact = True
        raise


class Leader:
    """Rank 0's side; `link` leads to the others. It stands where a pipeline has its coordinator."""

    can_save = True  # all that a checkpoint holds is here

    def __init__(self, inputs: Inputs, peers: Peers, link: Link, heard: Callable[[int], None]) -> None:
        self.inputs, self.peers, self.link, self.heard = inputs, peers, link, heard
        self.is_idle = False
        self.exchange: Exchange | None = None
        self._known: list[set[str]] = [set() for _ in link.parts]  # hashes of plans, by rank

    def join(self, executor: Executor) -> None:
        """Wait until the others have loaded; the executor is one of several from then on."""
        from lopt_edge.run.ranks import Exchange

        for peer in self.link.others:
            self.link.receive_message(peer)
        self.exchange = Exchange(self.link, self.inputs.device)
        executor.link, executor.peers.exchange = self.link, self.exchange
        self.is_idle = True

    def run(
        self,
        executor: Executor,
        kind: StepKind,
        plan: Plan,
        batches: Sequence[Batch],
        *,
        step: int,
        learning_rates: Rates,
        start: Cut | None,
        between: Callable[[Cut], None],
    ) -> StepResult:
        """One step over these batches in all ranks; `plan` is that of this one's share. Otherwise as `Executor.run`.

        `between` is not called: a stop or a checkpoint waits for the step's end.
        """
        assert start is None, "a step that ranks share begins whole"
        self.is_idle = False
        totals, dealt, first = window_totals(batches), shares(batches, len(self.link.parts)), 0
        for peer, share in enumerate(dealt):
            if peer:
                message = self._step_message(peer, self.inputs.plan(len(share), kind), share)
                message |= {"step": step, "first": first, "totals": asdict(totals), "scale": executor.loss_scale}
                with _between_steps():
                    self.link.send_message(peer, {**message, "rates": list(learning_rates.items())})
            first += len(share)
        own = Share(0, totals)
        try:
            result = executor.run(plan, dealt[0], step=step, learning_rates=learning_rates, share=own)
        except NotFinite:  # all have agreed on it; after any other fault they wait for a sum that does not come
            self.is_idle = not self.link.broken
            raise
        self.is_idle = True
        for report in self.link.reports[1:]:
            if number := report.pop("signal", 0):
                self.heard(number)
        return result

    def _step_message(self, peer: int, plan: Plan, share: Sequence[Batch]) -> dict[str, Any]:
        known, name = self._known[peer], plan.hash()
        if forget := len(known) >= MOST_KNOWN:
            known.clear()
        text = None if name in known else plan.text()
        known.add(name)
        batches = [as_message(batch, whole=True) for batch in share]
        return {"do": "step", "plan": name, "text": text, "forget": forget, "batches": batches}

    def held_out(
        self,
        model: Model,
        evaluated: Mapping[str, Sequence[Batch]],
        *,
        token_tile: int,
        layers: Sequence[int] | None,
        between: Callable[[], None],
    ) -> dict[str, float]:
        """The mean task loss of each set of batches by its name, each rank having its share of them: bitwise that of one
        process. `between` is called before each batch of this rank; what it raises comes when the others are done."""
        with _between_steps():
            return {name: self._held_out(model, found, token_tile, layers, between) for name, found in evaluated.items()}

    def _held_out(
        self,
        model: Model,
        batches: Sequence[Batch],
        token_tile: int,
        layers: Sequence[int] | None,
        between: Callable[[], None],
    ) -> float:
        self.is_idle, n = False, len(self.link.parts)
        found: list[list[float]] = [[] for _ in batches]
        for peer in self.link.others:  # batches are sorted by length: every n-th one is a fair share
            share = [as_message(batch, whole=True) for batch in batches[peer::n]]
            message = {"do": "evaluate", "token_tile": token_tile, "layers": layers and list(layers), "batches": share}
            self.link.send_message(peer, message)
        stopped: KeyboardInterrupt | None = None
        for place in range(0, len(batches), n):
            try:
                between()
            except KeyboardInterrupt as stop:  # of ours (errors.Interrupted)
                stopped = stop
                break
            found[place] = batch_losses(model, batches[place], token_tile, layers)
        for peer in self.link.others:
            found[peer::n] = self.link.receive_message(peer)["losses"]
        self.is_idle = True
        if stopped is not None:
            raise stopped
        total = 0.0
        for losses in found:
            for loss in losses:
                total += loss
        return total / max(1, sum(batch.n_supervised for batch in batches))

    def load_adapter(self, folder: Path) -> None:
        """Do nothing: what is read back at the run's end is reported and saved by this rank alone."""

    def peaks(self) -> dict[str, int]:
        """The largest rank's peaks in bytes, by name: each has a budget of its own."""
        reports = [self.link.report(), *(report for report in self.link.reports[1:] if report)]
        return {name: max(report[name] for report in reports) for name in ("rss", "device", "disk")}

    def explained(self, error: RunError) -> RunError:
        """The error to raise for this one: for a lost rank with the reason, as far as it can be known.

        The adapters here are whole unless the step's updates had begun. Raises InputError for a fault that a rank found in
        its input.
        """
        if not isinstance(error, PeerLost):
            return error
        found = self.peers.explained(error)
        found.values_intact = error.values_intact
        return found

    def close(self) -> None:
        """Let the others end, if they wait for something to do."""
        if self.exchange is not None:
            self.exchange.close()
        if self.is_idle and not self.link.broken:
            try:
                self.link.broadcast({"do": "end"})
                self.peers.are_done = True
            except PeerLost:  # it ended already
                pass
