"""What a run will take, tier by tier: the timeline of its largest step, the process around it, and the evaluation.

On the CPU the device tier is the process' resident set: the library's own memory (interpreter, torch, model code: measured
by the caller, or LIBRARY_BYTES), the tensors of the timeline, and what the allocator keeps between them (SLACK). On CUDA it
is the allocator's reserved bytes: the timeline, the kernels' workspaces and rounding. A prediction errs upwards.

Which knobs to try is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lopt_edge.plan.budget import Budget, format_bytes
from lopt_edge.plan.ops import Plan
from lopt_edge.plan.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.timeline import Timeline, timeline

LIBRARY_BYTES = {"cpu": 350 << 20, "cuda": 0}  # torch 218 MiB, transformers' model code 113, the rest of a run 20
SLACK_SHARE = {"cpu": 0.12, "cuda": 0.04}  # of what a step moves: gaps on the heap; rounding to 2 MiB blocks
SLACK_BYTES = {"cpu": 96 << 20, "cuda": 96 << 20}  # kernels, threads, gaps; cuBLAS workspaces


@dataclass(frozen=True)
class Prediction:
    """Peaks in bytes. `device_bytes` holds for a process that does nothing else."""

    timeline: Timeline
    library_bytes: int
    slack_bytes: int
    evaluation_bytes: int
    host_bytes: int
    disk_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.library_bytes + max(self.timeline.peak_bytes, self.evaluation_bytes) + self.slack_bytes

    @property
    def peak_op(self) -> str:
        return self.timeline.peak_row.op.text() if self.timeline.peak_bytes >= self.evaluation_bytes else "evaluation"

    def fits(self, budget: Budget) -> bool:
        return not self.misfits(budget)

    def misfits(self, budget: Budget) -> list[str]:
        """One sentence for each budget that is too small."""
        tiers = (("device", self.device_bytes, budget.device_bytes), ("host", self.host_bytes, budget.host_bytes),
                 ("disk", self.disk_bytes, budget.disk_bytes))  # fmt: skip
        return [
            f"{tier} memory: {format_bytes(need)} needed, {format_bytes(limit)} allowed"
            for tier, need, limit in tiers
            if limit is not None and need > limit
        ]


def predict(
    plan: Plan,
    sizes: Sizes,
    batches: Sequence[MicroBatchSize],
    *,
    library_bytes: int | None = None,
    evaluation: MicroBatchSize | None = None,
) -> Prediction:
    """`evaluation` is the largest batch of the held-out data (forward only)."""
    device_type = sizes.shape.device_type
    found = timeline(plan, sizes, batches)
    steady = sum(sizes.persistent(plan).values())
    moving = found.peak_bytes - steady
    evaluated = 0
    if evaluation is not None:
        passing = 2 * sizes.hidden_bytes(evaluation) + sizes.frame_bytes(evaluation)
        evaluated = steady + passing + max(sizes.within("forward", evaluation), sizes.loss_within(evaluation, task=True))
    slack = SLACK_BYTES[device_type] + round(SLACK_SHARE[device_type] * max(moving, evaluated - steady))
    library = LIBRARY_BYTES[device_type] if library_bytes is None else library_bytes
    return Prediction(found, library, slack, evaluated, found.host_bytes, found.disk_bytes)
