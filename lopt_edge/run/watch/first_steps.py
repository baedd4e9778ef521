"""The plan against the run: what each op of the first two steps took, beside what was predicted, in `plan.json`.

The first step is the largest one of the run (data/order.py), the second is the first with all optimizer states: what is
too much shows here and not in hour five. On the CPU an op's bytes are the resident set at its end, and the process' peak
if the op raised it; on a GPU what the allocator has reserved by then, and the context. Reading them costs some 0.1 ms an
op, so only two steps are read. A peak beyond the prediction is reported, and the prediction corrected by what was measured
(plan/costs/correction.py) is kept beside it; nothing is changed by either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lopt_edge.plan.costs.correction import Watched, corrected_bytes
from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.plan.schedule.ops import Op
from lopt_edge.plan.search.run_plan import RunPlan
from lopt_edge.run.device import device_of
from lopt_edge.run.step.executor import Executor
from lopt_edge.system.files import write_text
from lopt_edge.units import format_bytes

PLAN_NAME = "plan.json"
N_STEPS = 2


class FirstSteps:
    """A watch on steps of an executor, which keeps what was predicted and what was measured of each.

    `evaluated` says whether the run has evaluated before, so that the peak so far contains an evaluation.
    """

    def __init__(self, executor: Executor, *, evaluated: bool = True) -> None:
        self.executor, self.device, self.evaluated = executor, device_of(executor.model.device), evaluated
        self.steps: list[dict[str, Any]] = []
        self.watched: list[Watched] = []

    @contextmanager
    def watching(self, step: int, prediction: Prediction) -> Iterator[None]:
        """A context around one `executor.run` that measures it op by op; `prediction` is that of its micro-batches."""
        measured: list[int] = []
        peak = self._peak()

        def observe(op: Op, after: bool) -> None:
            nonlocal peak
            if after:
                highest = self._peak()
                measured.append(highest if highest > peak else self._now(prediction))
                peak = highest

        with self.executor.observed(observe):
            yield
        rows = prediction.timeline.rows
        self.steps.append(
            {
                "step": step,
                "predicted_device_bytes": max(map(prediction.op_bytes, rows)),
                "measured_device_bytes": max(measured),
                "ops": [
                    {"op": row.op.text(), "predicted_bytes": prediction.op_bytes(row), "measured_bytes": n_bytes}
                    for row, n_bytes in zip(rows, measured, strict=True)
                ],
            }
        )
        alone = replace(prediction, saving_bytes=0, evaluation_bytes=prediction.evaluation_bytes if self.evaluated else 0)
        self.watched.append(Watched(alone.device_bytes, self._peak_so_far(prediction)))

    def _peak_so_far(self, prediction: Prediction) -> int:
        return self.device.peak_bytes() + self._context(prediction)

    def _peak(self) -> int:
        """The process' peak so far in bytes. An allocator's is not asked (0): it keeps what it reserved."""
        return self.device.peak_bytes() if self.device.kind.counts_process else 0

    def _now(self, prediction: Prediction) -> int:
        return self.device.taken_bytes() + self._context(prediction)

    def _context(self, prediction: Prediction) -> int:
        """The bytes on the device that its own count leaves out."""
        return 0 if self.device.kind.counts_process else prediction.library_bytes

    def surprise(self, largest_bytes: int) -> str | None:
        """A sentence for the user if the last step took more than the largest is predicted to take, else None.

        A shorter step than that may find the holes of a longer one, which are given back where they would exceed it.
        """
        last = self.steps[-1]
        predicted, measured = max(largest_bytes, last["predicted_device_bytes"]), last["measured_device_bytes"]
        if measured <= predicted:
            return None
        at = max(last["ops"], key=lambda row: row["measured_bytes"])["op"]
        return (
            f"step {last['step']} took {format_bytes(measured)} at {at}, {measured / predicted - 1:.1%} more than the "
            f"{format_bytes(predicted)} predicted; keep that much room"
        )

    def corrected_bytes(self, largest_bytes: int) -> int | None:
        """The device bytes that training will take, computed from the watched steps; None if no step was watched.

        `largest_bytes` is what was predicted for the largest step.
        """
        return corrected_bytes(self.watched, largest_bytes, device_type=self.device.kind.name) if self.watched else None

    def correction(self, largest_bytes: int) -> str:
        """The result of `corrected_bytes` as a sentence for the user; at least one step has been watched."""
        corrected = self.corrected_bytes(largest_bytes)
        assert corrected is not None
        so_far = max(step.measured_bytes for step in self.watched)
        told = f"device memory after step {self.steps[-1]['step']}: {format_bytes(so_far)} so far"
        if corrected == largest_bytes:
            return f"{told}; the {format_bytes(corrected)} that were predicted hold"
        return f"{told}; corrected to {format_bytes(corrected)} ({format_bytes(largest_bytes)} predicted before)"

    def write(self, output: Path, plan: RunPlan, *, corrected_bytes: int | None) -> None:
        """Write the plan, the watched steps and the corrected bytes to `plan.json` in the output folder."""
        values = {"plan": plan.as_dict(), "corrected_device_bytes": corrected_bytes, "steps": self.steps}
        write_text(output / PLAN_NAME, json.dumps(values, indent=1) + "\n")
