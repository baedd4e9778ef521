"""What a run will take, tier by tier: the timeline of its largest step, the process around it, and the evaluation.

On the CPU the device tier is the process' resident set: the library's own memory (interpreter, torch, model code: measured
by the caller, or as usual), the tensors of the timeline, and what the allocator keeps between them (slack). On CUDA it
is the allocator's reserved bytes: the timeline, the kernels' workspaces and rounding. A prediction errs upwards.

Which knobs to try is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes, on_disk
from lopt_edge.plan.costs.timeline import Timeline, timeline
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.units import format_bytes

# What the allocator keeps between tensors. CPU: 35 to 220 MiB in the 0.5B, 1.5B and 3B shapes, 64 to 1,024 tokens (tools/
# tools/validate_planner.py process). With 20 MiB less one of 42 runs took 0.6% more than predicted; none was over its
# budget. It is the slack of the device's kind (plan/facts/device_kinds.py), and on a CPU:
GRAPH_SHARE = 0.18  # CPU: of the graphs that are there at the peak: their small tensors lie on the heap
PAGED_SHARE = 0.06  # CPU: of the graphs that are paged: so do theirs, and leave gaps
STEADY_SHARE = 0.06  # CPU: of what lives from step to step: what loading and the first updates leave on the heap
STATES_SLACK = 45 << 20  # CPU: optimizer states that come and go
GAP_SHARE, GAP_BYTES = 1 / 16, 256 << 10  # in page files, of what comes and goes: gaps too small for what comes next;
# measured on tiny models: up to 106 KiB beyond the share


@dataclass(frozen=True)
class Prediction:
    """The predicted peaks of a step in bytes.

    `device_bytes` holds for a process that does nothing else. `disk_bytes` include `journal_bytes`. `steady` is what lives
    from step to step, by category.
    """

    timeline: Timeline
    library_bytes: int
    slack_bytes: int
    evaluation_bytes: int
    steady: dict[str, int]
    journal_bytes: int = 0
    gap_bytes: int = 0  # on disk
    others: tuple[int, int] = (0, 0)  # host and disk bytes of the run's other kinds of step, at most
    teaching_bytes: int = 0  # tensors of another teacher's pass before the training, the weights beside it included

    @property
    def host_bytes(self) -> int:
        """The peak of host memory."""
        return max(self.timeline.host_bytes, self.others[0])

    @property
    def disk_bytes(self) -> int:
        """The most bytes of page files on the disk."""
        return max(self.timeline.disk_bytes + self.gap_bytes, self.others[1])

    @property
    def _tensor_bytes(self) -> int:
        return max(self.timeline.peak_bytes, self.evaluation_bytes, self.teaching_bytes)

    @property
    def _in_teaching(self) -> bool:
        return self.teaching_bytes > max(self.timeline.peak_bytes, self.evaluation_bytes)

    @property
    def _in_evaluation(self) -> bool:
        return self.evaluation_bytes > self.timeline.peak_bytes and not self._in_teaching

    @property
    def held_at_peak(self) -> dict[str, int]:
        """Tensor bytes by category when the op of the peak begins."""
        if self._in_teaching:
            return _without_training(self.steady)
        return self.steady if self._in_evaluation else self.timeline.peak_row.held

    @property
    def within_peak(self) -> int:
        """The bytes that the op of the peak takes on top of what lives when it begins."""
        return self._tensor_bytes - sum(self.held_at_peak.values())

    @property
    def device_bytes(self) -> int:
        """The device's peak: tensors, libraries or context, and the allocator's slack."""
        return self.library_bytes + self._tensor_bytes + self.slack_bytes

    @property
    def peak_op(self) -> str:
        """The text of the op at which the device's peak falls, or what else takes the most."""
        if self._in_teaching:
            return "the teacher's pass"
        return "evaluation" if self._in_evaluation else self.timeline.peak_row.op.text()

    @property
    def at_loss(self) -> bool:
        """Whether a smaller tile of the loss may take less."""
        return self._in_evaluation or self.timeline.peak_row.op.kind is Kind.LOSS

    def fits(self, budget: Budget) -> bool:
        """Whether every tier's peak is inside its budget."""
        return not self.misfits(budget)

    def misfits(self, budget: Budget) -> list[str]:
        """The budgets that are too small, a sentence for each."""
        tiers = (("device", self.device_bytes, budget.device_bytes), ("host", self.host_bytes, budget.host_bytes),
                 ("disk", self.disk_bytes, budget.disk_bytes))  # fmt: skip
        return [
            f"{tier} memory: {format_bytes(need)} needed, {format_bytes(limit)} allowed"
            for tier, need, limit in tiers
            if limit is not None and need > limit
        ]


def _without_training(steady: dict[str, int]) -> dict[str, int]:
    """What is there by category before adapters, gradients and moments are."""
    return {name: n_bytes for name, n_bytes in steady.items() if name in ("weights", "workspace", "head")}


def largest(found: Sequence[Prediction]) -> Prediction:
    """The prediction of the kind of step that takes the most device memory, with the others' needs on the tiers below."""
    most = max(found, key=lambda one: one.device_bytes)
    return replace(most, others=(max(one.host_bytes for one in found), max(one.disk_bytes for one in found)))


def slack_bytes(device_type: str, moving_bytes: int) -> int:
    """The bytes that the allocator takes beside a step's tensors; `moving_bytes` of them come and go."""
    kind = kind_of(device_type)
    return kind.slack_bytes + round(kind.slack_share * moving_bytes)


def _slack_of_movements(plan: Plan, sizes: Sizes, found: Timeline) -> int:
    """The bytes that graphs, loading and optimizer states leave behind on a CPU's heap."""
    graphs = GRAPH_SHARE * found.peak_row.held.get("activations", 0)
    steady = STEADY_SHARE * sum(sizes.persistent(plan).values())
    paged = 0.0
    if any(op.kind is Kind.PAGE_OUT for op in plan.ops):
        paged = PAGED_SHARE * (found.disk_bytes - sizes.persistent_below(plan.own_segments)["disk"])
    return round(graphs + steady + paged) + (STATES_SLACK if sizes.knobs.states != "device" else 0)


def predict(
    plan: Plan,
    sizes: Sizes,
    batches: Sequence[MicroBatchSize],
    *,
    library_bytes: int | None = None,
    evaluation: MicroBatchSize | None = None,
    beside_bytes: int = 0,
    teaching_bytes: int = 0,
) -> Prediction:
    """The peaks of one step. `evaluation` is the largest batch of the held-out data (forward only); `beside_bytes` live
    through all of the step; `teaching_bytes` are those of another teacher's pass (teacher_pass.py), beside the weights."""
    kind = sizes.shape.kind
    sizes = replace(sizes, evaluates=evaluation is not None)
    found = timeline(plan, sizes, batches, beside_bytes=beside_bytes)
    by_category = sizes.persistent(plan)
    steady = sum(by_category.values())
    moving = found.peak_bytes - steady
    evaluated = 0
    if evaluation is not None:
        passing = 2 * sizes.hidden_bytes(evaluation) + sizes.layer_context_bytes(evaluation) + sizes.batch_bytes(evaluation)
        most = max(sizes.forward_within(evaluation, layer, s) for s in plan.own_segments for layer in s.layers)
        evaluated = steady + passing + max(most, sizes.loss_within(evaluation, task=True)) + sizes.intact_bytes
    slack = slack_bytes(kind.name, max(moving, evaluated - steady, teaching_bytes))
    slack += _slack_of_movements(plan, sizes, found) if kind.counts_process else 0
    library = kind.library_bytes if library_bytes is None else library_bytes
    paged = found.disk_bytes - sizes.persistent_below(plan.own_segments)["disk"]
    gaps = on_disk(round(GAP_SHARE * paged) + GAP_BYTES) if paged else 0
    taught = teaching_bytes and teaching_bytes + sum(_without_training(by_category).values())
    return Prediction(
        found, library, slack, evaluated, by_category, sizes.journal_bytes(plan.own_segments), gaps, teaching_bytes=taught
    )
