"""What a run will take, tier by tier: the timeline of its largest step, the process around it, and the evaluation.

On the CPU the device tier is the process' resident set: the library's own memory (interpreter, torch, model code: measured
by the caller, or as usual), the tensors of the timeline, and what the allocator keeps between them (slack). On CUDA it
is the allocator's reserved bytes: the timeline, the kernels' workspaces and rounding. A prediction errs upwards.

Which knobs to try is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lopt_edge.plan.costs.key_bytes import all_keys_bytes
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes, on_disk
from lopt_edge.plan.costs.timeline import OpBytes, Timeline, timeline
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.units import format_bytes

# A CPU's heap is trimmed before an op (system/allocator.py) where the op's own bytes and these might exceed the prediction.
NEAR_BYTES = 4 << 20
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
    kept_bytes: int  # by the allocator, whatever happens: its least slack
    evaluation_bytes: int
    steady: dict[str, int]
    journal_bytes: int = 0
    gap_bytes: int = 0  # on disk
    others: tuple[int, int] = (0, 0)  # host and disk bytes of the run's other kinds of step, at most
    teaching_bytes: int = 0  # tensors of another teacher's pass before the training, the weights beside it included
    within_share: float = 0.0  # of what an op takes on top of what lives: the allocator's slack beside the least
    evaluating_bytes: int = 0  # of those in evaluation_bytes, what an op takes on top
    ring_bytes: int = 0  # of the weights: buffers that streamed layers share
    saving_bytes: int = 0  # of what is there when the adapter is saved at the end, and what saving brings with it

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
        return max(self.timeline.peak_bytes, self.evaluation_bytes, self.teaching_bytes, self.saving_bytes)

    @property
    def _in_saving(self) -> bool:
        return self.saving_bytes > max(self.timeline.peak_bytes, self.evaluation_bytes, self.teaching_bytes)

    @property
    def _in_teaching(self) -> bool:
        return self.teaching_bytes > max(self.timeline.peak_bytes, self.evaluation_bytes) and not self._in_saving

    @property
    def _in_evaluation(self) -> bool:
        return self.evaluation_bytes > self.timeline.peak_bytes and not (self._in_teaching or self._in_saving)

    @property
    def held_at_peak(self) -> dict[str, int]:
        """Tensor bytes by category when the op of the peak begins."""
        if self._in_saving:
            kept = kept_at_the_end(self.steady)
            kept["weights"] -= self.ring_bytes
            return {**kept, "saving": self.saving_bytes - sum(kept.values())}
        if self._in_teaching:
            return _without_training(self.steady)
        return self.steady if self._in_evaluation else self.timeline.peak_row.held

    @property
    def within_peak(self) -> int:
        """The bytes that the op of the peak takes on top of what lives when it begins."""
        return self._tensor_bytes - sum(self.held_at_peak.values())

    def op_bytes(self, row: OpBytes) -> int:
        """The device's bytes at an op of the step: tensors, libraries or context, and the allocator's slack."""
        return self.library_bytes + self.kept_bytes + row.peak_bytes + round(self.within_share * row.within)

    @cached_property
    def device_bytes(self) -> int:
        """The device's peak: tensors, libraries or context, and the allocator's slack."""
        step = self.timeline.most_bytes(self.within_share)
        evaluation = self.evaluation_bytes and self.evaluation_bytes + round(self.within_share * self.evaluating_bytes)
        return self.library_bytes + self.kept_bytes + max(step, evaluation, self.teaching_bytes, self.saving_bytes)

    @property
    def slack_bytes(self) -> int:
        """What the allocator keeps between tensors at the device's peak."""
        return self.device_bytes - self.library_bytes - self._tensor_bytes

    @property
    def trim_bytes(self) -> int:
        """The resident set from which on a CPU's heap is trimmed before an op: less would trim before each of them."""
        return self.device_bytes - self.timeline.most_within - NEAR_BYTES

    @property
    def peak_op(self) -> str:
        """The text of the op at which the device's peak falls, or what else takes the most."""
        if self._in_saving:
            return "saving"
        if self._in_teaching:
            return "the teacher's pass"
        return "evaluation" if self._in_evaluation else self.timeline.peak_op.text()

    @property
    def at_loss(self) -> bool:
        """Whether a smaller tile of the loss may take less."""
        if self._in_saving or self._in_teaching:
            return False
        return self._in_evaluation or self.timeline.peak_op.kind is Kind.LOSS

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


def kept_at_the_end(steady: dict[str, int]) -> dict[str, int]:
    """What is there by category when a run saves: moments and gradients were let go."""
    return {name: n_bytes for name, n_bytes in steady.items() if name not in ("optimizer", "gradients")}


def largest(found: Sequence[Prediction]) -> Prediction:
    """The prediction of the kind of step that takes the most device memory, with the others' needs on the tiers below."""
    most = max(found, key=lambda one: one.device_bytes)
    return replace(most, others=(max(one.host_bytes for one in found), max(one.disk_bytes for one in found)))


def slack_bytes(device_type: str, moving_bytes: int) -> int:
    """The least bytes that the allocator takes beside a step's tensors; `moving_bytes` of them come and go."""
    kind = kind_of(device_type)
    return kind.slack_bytes + round(kind.slack_share * moving_bytes)


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
    sizes = sizes.closing(plan.closed, evaluates=evaluation is not None)
    found = timeline(plan, sizes, batches, beside_bytes=beside_bytes)
    by_category = sizes.persistent(plan)
    steady = sum(by_category.values())
    moving = found.peak_bytes - steady
    evaluated = evaluating = 0
    if evaluation is not None:
        passing = 2 * sizes.hidden_bytes(evaluation) + sizes.layer_context_bytes(evaluation) + sizes.batch_bytes(evaluation)
        passing += all_keys_bytes(sizes, evaluation)
        most = max(sizes.forward_within(evaluation, layer, s) for s in plan.own_segments for layer in s.layers)
        evaluating = max(most, sizes.loss_within(evaluation, task=True))
        evaluated = steady + passing + evaluating + sizes.intact_bytes
    taught = teaching_bytes and teaching_bytes + sum(_without_training(by_category).values())
    kept = sum(kept_at_the_end(by_category).values()) - sizes.ring_bytes
    saved = kept + kind.saving_bytes if kind.saving_bytes else 0
    least_slack = slack_bytes(kind.name, max(moving, evaluated - steady, teaching_bytes))
    library = kind.library_bytes if library_bytes is None else library_bytes
    paged = found.disk_bytes - sizes.persistent_below(plan.own_segments)["disk"]
    gaps = on_disk(round(GAP_SHARE * paged) + GAP_BYTES) if paged else 0
    return Prediction(
        found,
        library,
        least_slack,
        evaluated,
        by_category,
        sizes.journal_bytes(plan.own_segments),
        gaps,
        teaching_bytes=taught,
        within_share=kind.within_share,
        evaluating_bytes=evaluating,
        ring_bytes=sizes.ring_bytes,
        saving_bytes=saved,
    )
