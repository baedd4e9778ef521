"""Process 0's side of a pipeline: it leads the other processes.

Process 0 is the run: it reads the data, keeps the clock, the log, the checkpoints and the signals, and sends the others
each thing that they shall do (worker.py), one at a time: a step with its batches, an evaluation, to hand out a group's
values. So nothing needs to be agreed on but whether all numbers of a step are finite (run/link.py), and a checkpoint
is that of one process, gathered one group at a time: it can be resumed with any number of processes.

The rules: between two things the others wait (`is_idle`), and only then can anything be gathered; when one is lost, so is
its part of the adapter, and the run ends with the newest checkpoint; none is left when process 0 leaves `open_coordinator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lopt_edge.errors import NotFinite, PeerLost, RunError
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.schedule.ops import GroupName
from lopt_edge.plan.schedule.processes import Part, parts_of
from lopt_edge.run.step.batches import Batch, as_message
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.step_state import Cut, Rates, StepResult
from lopt_edge.training.pipeline.launch import FOLLOW
from lopt_edge.training.pipeline.peers import Peers, started

if TYPE_CHECKING:
    from lopt_edge.plan.schedule.build import StepKind
    from lopt_edge.plan.schedule.ops import Plan
    from lopt_edge.run.link import FarGroup, Link
    from lopt_edge.training.checkpoint.resume import Start
    from lopt_edge.training.prepare.inputs import Inputs


@contextmanager
def open_coordinator(
    inputs: Inputs, start: Start | None, *, report: Callable[[], dict[str, int]]
) -> Iterator[Coordinator | None]:
    """The coordinator of the other processes, which are started and know what the run is; None without a pipeline.

    `report` gives this process' peaks, in bytes by name.
    """
    if inputs.part is None:
        yield None
        return
    config = inputs.config
    parts, timeout = parts_of(inputs.course.kinds[0].segments, config.pipeline), timedelta(minutes=config.pipeline_minutes)
    with started(parts, follow=FOLLOW, timeout=timeout, whole=" of the pipeline") as peers:
        link = peers.meet(_setup(inputs, parts, start), report=report)
        coordinator = Coordinator(peers, parts, link, shares_memory=kind_of(inputs.device.type).counts_process)
        try:
            yield coordinator
        except PeerLost as error:
            raise coordinator.explained(error) from None
        if coordinator.is_idle:
            coordinator.link.broadcast({"do": "end"})
            peers.are_done = True


def _setup(inputs: Inputs, parts: Sequence[Part], start: Start | None) -> dict[str, Any]:
    """The facts that the others need to know, as JSON values."""
    config = inputs.config
    predicted = [replace(inputs.workload, part=part).predict(inputs.knobs) for part in parts]
    return {
        "config": config.model_dump(mode="json"),
        "knobs": asdict(inputs.knobs),
        "adapter": config.init_adapter if start is None else str(start.checkpoint.folder),
        "resumed": None if start is None else str(start.checkpoint.folder),
        "disk_bytes": [one.disk_bytes for one in predicted],
        "journal_bytes": [one.journal_bytes for one in predicted],
        "trim_bytes": [one.trim_bytes for one in predicted],
        "mmap_bytes": inputs.workload.mmap_bytes(inputs.knobs),
        "device": inputs.device.type,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),  # as here: products of several threads are summed in another order
    }


class Coordinator:
    """Process 0's side of a pipeline; `link` leads to the others.

    Executor and model also ask it for what lies there (FarGroups, FarLayers).
    """

    def __init__(self, peers: Peers, parts: Sequence[Part], link: Link, *, shares_memory: bool) -> None:
        self.peers, self.parts, self.link, self.shares_memory = peers, parts, link, shares_memory
        self.is_idle = False

    @property
    def can_save(self) -> bool:
        """Whether a checkpoint can be written now: only idle processes hand out what they have."""
        return self.is_idle

    def join(self, executor: Executor) -> None:
        """Wait until the others have loaded; the executor is one of a pipeline from then on."""
        for peer in self.link.others:
            self.link.receive_message(peer)
        self.is_idle = True
        executor.link, executor.far, executor.model.far = self.link, self, self

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Mark the others as busy; only after what all have agreed on are they idle in spite of an error."""
        self.is_idle = False
        try:
            yield
        except (NotFinite, KeyboardInterrupt):
            self.is_idle = not self.link.broken
            raise
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
        """One step in all processes, otherwise as `Executor.run`.

        A pipeline has micro-batches in several places at once: `between` is not called, and a stop or a checkpoint waits
        for the step's end.
        """
        with self._busy():
            self.link.broadcast(
                {
                    "do": "step",
                    "step": step,
                    "kind": kind.name,
                    "batches": [as_message(batch) for batch in batches],
                    "rates": list(learning_rates.items()),  # JSON has no keys but strings
                    "start": None if start is None else start.micro_batch,
                }
            )
            return executor.run(plan, batches, step=step, learning_rates=learning_rates, start=start)

    def load_adapter(self, folder: Path) -> None:
        """Let every other process load its own layers' adapters from a folder."""
        with self._busy():
            self.link.broadcast({"do": "load adapter", "folder": str(folder)})
            for peer in self.link.others:
                self.link.receive_message(peer)

    def peaks(self) -> dict[str, int]:
        """The peaks of all processes in bytes, by name.

        On a CPU they share the memory, so their peaks add up (an upper bound); on GPUs the largest counts.
        """
        add = sum if self.shares_memory else max
        found = {name: sum(report[name] for report in self.link.reports) for name in ("rss", "disk")}
        return {**found, "device": add(report["device"] for report in self.link.reports)}

    # what lies in other processes ------------------------------------------------------------------------------------

    def _ask(self, peer: int, message: dict[str, Any]) -> dict[str, Any]:
        with self._busy():
            self.link.send_message(peer, message)
            return self.link.receive_message(peer)

    @property
    def groups(self) -> dict[GroupName, FarGroup]:
        """The parameter groups of the other processes, asked for anew each time."""
        from lopt_edge.run.link import FarGroup

        found = (each for peer in self.link.others for each in self._ask(peer, {"do": "groups"})["groups"])
        return {(unit, target): FarGroup(*facts) for unit, target, *facts in found}

    def _peer(self, group: GroupName) -> int:
        return next(part.rank for part in self.parts if part.owns(group))

    def tensor(self, what: str, name: GroupName, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A far group's tensor (`what`: values or moments), on the CPU."""
        peer = self._peer(name)
        with self._busy():
            self.link.send_message(peer, {"do": "give", "what": what, "group": list(name)})
            return self.link.receive_tensor(peer, shape, dtype)

    @cached_property
    def _shapes(self) -> dict[int, list[Any]]:
        found = [self._ask(peer, {"do": "shapes"})["shapes"] for peer in self.link.others]
        return {layer: shapes for each in found for layer, shapes in each}

    def shapes(self, layer: int) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """The far adapters of a layer: (module, shape of A, shape of B)."""
        return [(name, (a[0], a[1]), (b[0], b[1])) for name, a, b in self._shapes.get(layer, [])]

    def matrices(self, layer: int) -> Iterator[Tensor]:
        """The far adapter matrices of a layer, in the order of `shapes`; they come in one piece."""
        shapes = [shape for _, *pair in self.shapes(layer) for shape in pair]
        if not shapes:
            return
        peer = self._peer(("layer", layer))
        with self._busy():
            self.link.send_message(peer, {"do": "give", "what": "matrices", "group": ["layer", layer]})
            flat = self.link.receive_tensor(peer, (sum(map(prod, shapes)),), torch.float32)
        for shape in shapes:
            yield flat[: prod(shape)].view(shape)
            flat = flat[prod(shape) :]

    def explained(self, error: RunError) -> RunError:
        """The error to raise for this one: for a lost process with the reason, as far as it can be known.

        Raises InputError for a fault that a process found in its input.
        """
        return self.peers.explained(error)
