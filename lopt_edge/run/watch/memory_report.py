"""The memory report of a run (`--memory-report FILE`): predicted and measured bytes of one step, op by op.

One step is watched, the second where there is one (buffers have grown, moments exist): on the CPU by counting live tensors
(tracker.py; that step takes longer), on a GPU by the allocator's own counters. Written are FILE.json (all rows, by
category) and FILE.svg (the picture). Measured categories are what the runtime's stores keep; what is alive beyond them is
activations. The resident set is written beside them: it contains the library and the allocator's gaps, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lopt_edge.pictures.step_bytes import OpRow, draw_timeline
from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.plan.schedule.ops import Op
from lopt_edge.run.device import device_of
from lopt_edge.run.devices.interface import Counters
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.watch.tracker import MemoryTracker
from lopt_edge.system.files import write_text
from lopt_edge.system.memory import resident_bytes


@dataclass
class MeasuredOp:
    """What one op took in bytes: tensors by category at its beginning, their peak during it, the resident set after it."""

    text: str
    held: dict[str, int]
    peak_bytes: int
    rss_bytes: int = 0


class MemoryMeter:
    """A meter that watches one step of an executor: `with meter.watching(batches): executor.run(...)`."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.rows: list[MeasuredOp] = []
        self.device = executor.model.device
        counters = device_of(self.device).counters()
        self.tracker: MemoryTracker | None = None
        if counters is None:
            counters = self.tracker = MemoryTracker(self.device.type)
        self.counters: Counters = counters

    @contextmanager
    def watching(self, batches: Sequence[Batch]) -> Iterator[None]:
        """A context around one `executor.run` over these batches, which fills `rows`."""
        self.rows = []
        if self.tracker is not None:
            self.tracker.watch(tensor for _, tensor in held_tensors(self.executor))
            for batch in batches:
                found = (batch.ids_BT, batch.supervised_N, batch.targets_N, batch.real_N)
                self.tracker.watch(tensor for tensor in found if tensor is not None)
        with self.executor.observed(self._observe), self.tracker or nullcontext():
            yield

    def _observe(self, op: Op, after: bool) -> None:
        if after:
            self.rows[-1].peak_bytes, self.rows[-1].rss_bytes = self.counters.peak_bytes, resident_bytes()
            return
        live = self._start_peak()
        held: dict[str, int] = {}
        seen: set[int] = set()
        for category, tensor in held_tensors(self.executor):
            storage = tensor.untyped_storage()
            if storage._cdata not in seen and tensor.device.type == self.device.type:
                seen.add(storage._cdata)
                held[category] = held.get(category, 0) + storage.nbytes()
        held["activations"] = held.get("activations", 0) + max(0, live - sum(held.values()))
        self.rows.append(MeasuredOp(op.text(), held, live))

    def _start_peak(self) -> int:
        self.counters.start_peak()
        return self.counters.live_bytes


def held_tensors(executor: Executor) -> Iterator[tuple[str, Tensor]]:
    """Yield (category, tensor) of all that the runtime's stores keep now, some of it perhaps on another tier."""
    model, optimizer = executor.model, executor.optimizer
    if model.weights is not None:
        yield from (("weights", tensor) for tensor in model.weights.tensors())
    for layer in [*model.layers, model.norm, *([model.own_inputs.norm] if model.own_inputs is not None else [])]:
        for parameter in (*layer.parameters(), *layer.buffers()):
            if not parameter.requires_grad:
                yield "weights", parameter
        for module in layer.modules():
            for tensor in (getattr(module, "bias", None), getattr(module, "weight", None)):
                if isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter):
                    yield "weights", tensor
            if (buffer := getattr(module, "buffer", None)) is not None:
                yield from (("workspace", tensor) for tensor in buffer.flat.values())
    if model.body is not None:
        yield from (("weights", parameter) for parameter in model.body.decoder.parameters())
    if model.scratch is not None:
        yield "workspace", model.scratch
    for vocabulary in (model.embedding, model.lm_head):
        yield from (("head", tensor) for tensor in vocabulary.tensors())
    yield from optimizer.tensors()
    if executor.averages is not None:
        yield from (("adapters", tensor) for tensor in executor.averages.flat.values())
    state = executor.state
    if state is not None:
        found = [*state.inputs.values()]
        yield from (("saved inputs", offloaded.tensor) for offloaded in found if offloaded.tensor is not None)
        if state.target_BTD is not None:
            yield "saved inputs", state.target_BTD


def write_report(
    path: str, prediction: Prediction, meter: MemoryMeter, *, title: str, budget_bytes: int | None, plan_hash: str
) -> tuple[Path, Path]:
    """Write the report as JSON and as SVG; returns both paths. Raises RunError if they cannot be written."""
    base = Path(path)
    json_path = base if base.suffix == ".json" else base.with_name(base.name + ".json")
    svg_path = json_path.with_suffix(".svg")
    rows, picture = [], []
    library = prediction.library_bytes
    for predicted, measured in zip(prediction.timeline.rows, meter.rows, strict=True):
        rows.append(
            {
                "op": predicted.op.text(),
                "predicted": {
                    "held": predicted.held,
                    "peak_bytes": predicted.peak_bytes,
                    "host_bytes": predicted.host_bytes,
                    "disk_bytes": predicted.disk_bytes,
                },
                "measured": {"held": measured.held, "peak_bytes": measured.peak_bytes, "rss_bytes": measured.rss_bytes},
            }
        )
        held = {"library": library, **predicted.held} if library else predicted.held
        picture.append(
            OpRow(
                predicted.op.text(),
                held,
                predicted.peak_bytes + library,
                measured.peak_bytes + library,
                host_bytes=predicted.host_bytes,
                disk_bytes=predicted.disk_bytes,
            )
        )
    top = max(meter.rows, key=lambda row: row.peak_bytes)
    report = {
        "plan_hash": plan_hash,
        "library_bytes": library,
        "slack_bytes": prediction.slack_bytes,
        "predicted": {"tensor_peak_bytes": prediction.timeline.peak_bytes, "op": prediction.timeline.peak_row.op.text(),
                      "device_bytes": prediction.device_bytes},
        "measured": {"tensor_peak_bytes": top.peak_bytes, "op": top.text,
                     "rss_bytes": max(row.rss_bytes for row in meter.rows)},
        "ops": rows,
    }  # fmt: skip
    json_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json_path, json.dumps(report, indent=1) + "\n")
    write_text(svg_path, draw_timeline(picture, title=title, budget_bytes=budget_bytes))
    return json_path, svg_path
