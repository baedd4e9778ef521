"""The workload: what a run's largest step asks for, whatever the knobs. With knobs it gives a plan, its bytes, its seconds.

One `Workload` for `lopt-edge plan` (a worst-case step of max_seq_len tokens) and for `finetune` (the longest examples of
the data): both ask the same functions, so that what was predicted is what runs.

A step of many micro-batches is predicted from its largest one (two, where gradients move between them): it holds the
most, another holds no more but its ids. Each of the others takes the seconds of their mean, since not all of them grow
with the tokens (streamed weights). A test compares both with the whole step. Where a method has several kinds of step,
bytes are those of the largest, seconds the mean over their shares. It chooses nothing (search.py). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from lopt_edge.plan.costs.predict import Prediction, largest, predict
from lopt_edge.plan.costs.seconds import StepSeconds, seconds_with_passes, step_seconds
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.costs.teacher_pass import Teacher
from lopt_edge.plan.facts.profile import DeviceProfile
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.schedule.build import StepKind, step_plan
from lopt_edge.plan.schedule.knobs import MLP_PIECES, TOKEN_TILES, Knobs
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.plan.schedule.passes import arrange, in_pieces
from lopt_edge.plan.schedule.processes import Part, cut_for_process, own_knobs
from lopt_edge.plan.schedule.validate import validate
from lopt_edge.system.allocator import LEAST_MMAP_BYTES, MMAP_BYTES

MOST_SIZES = 32  # kept: a combination's are asked for by its bounds, its clock and its replay
N_MOVING = 2  # micro-batches to look at where gradients move between them


@dataclass(frozen=True)
class Workload:
    """The largest step of a run. `batches` are its micro-batches, the longest first; `evaluation` the largest held-out
    batch.

    `library_bytes` is what the process takes beside its tensors: libraries on a CPU, the context on CUDA. `part`: what of
    it one process of a pipeline runs.
    """

    course: Course
    shape: LayerShape
    batches: tuple[MicroBatchSize, ...]
    profile: DeviceProfile
    library_bytes: int
    vocabulary_itemsize: int = 2
    evaluation: MicroBatchSize | None = None
    clip_scope: str = "segment"
    part: Part | None = None
    teacher: Teacher | None = None  # another model than the base

    @property
    def method(self) -> str:
        return self.course.method

    @property
    def kinds(self) -> tuple[StepKind, ...]:
        return self.course.kinds

    @property
    def n_tokens(self) -> int:
        """The number of tokens of the largest step, padding included."""
        return sum(batch.n_rows for batch in self.batches)

    def with_tokens(self, n_tokens: int) -> Workload:
        """The same run over sequences of another length, all supervised."""

        def long(b: MicroBatchSize) -> MicroBatchSize:
            return MicroBatchSize(b.n_sequences, n_tokens, b.n_sequences * (n_tokens - 1), scored=b.scored)

        return replace(self, batches=tuple(map(long, self.batches)), evaluation=self.evaluation and long(self.evaluation))

    def mmap_bytes(self, knobs: Knobs) -> int:
        """The size from which on the host allocator shall give a tensor pages of its own (system/allocator.py says why)."""
        graphs = any(
            knobs.activations[layer] != "recompute"
            for kind in self.kinds
            for segment in kind.segments
            for layer in segment.turned[:-1]
        )
        if not self.shape.kind.counts_process or not graphs:
            return MMAP_BYTES
        hidden = self.sizes(knobs).hidden_bytes(self.batches[0])
        return min(MMAP_BYTES, max(LEAST_MMAP_BYTES, round(0.9 * hidden)))

    def sizes(self, knobs: Knobs) -> Sizes:
        """The bytes of everything that the run has with these knobs."""
        if knobs not in self._sizes:
            if len(self._sizes) >= MOST_SIZES:
                self._sizes.clear()
            self._sizes[knobs] = self._make_sizes(knobs)
        return self._sizes[knobs]

    @cached_property
    def _sizes(self) -> dict[Knobs, Sizes]:
        return {}

    def _make_sizes(self, knobs: Knobs) -> Sizes:
        part, groups = self.part, self.course.groups
        if part is not None:
            knobs, groups = own_knobs(knobs, part), tuple(group for group in groups if part.owns(group))
        return Sizes(
            self.shape,
            knobs,
            vocabulary_itemsize=self.vocabulary_itemsize,
            evaluates=self.evaluation is not None,
            groups=groups,
            replaced=self.course.replaced,
        )

    def arranged(self, knobs: Knobs, n_micro_batches: int, kind: StepKind | None = None) -> Plan:
        """The plan of the first kind of step, unless another is named. It is not validated: the search makes many."""
        own = knobs if self.part is None else own_knobs(knobs, self.part)
        return arranged_plan(self.method, kind or self.kinds[0], own, n_micro_batches=n_micro_batches, part=self.part)

    def plan(self, knobs: Knobs, *, n_micro_batches: int, kind: StepKind | None = None) -> Plan:
        """The plan as the executor runs it. Raises PlanError if a pass broke a rule."""
        return validate(self.arranged(knobs, n_micro_batches, kind), clip_scope=self.clip_scope)

    def _few(self, knobs: Knobs) -> tuple[tuple[MicroBatchSize, ...], tuple[MicroBatchSize, ...]]:
        """The micro-batches that are looked at, and the others. The second one differs only where gradients move."""
        n_few = 1 if knobs.gradients == "device" else N_MOVING
        return self.batches[:n_few], self.batches[n_few:]

    def predict(self, knobs: Knobs, *, whole: bool = False, kind: StepKind | None = None) -> Prediction:
        """The peaks of the largest step of all kinds, or of one; `whole`: with a timeline over all its micro-batches."""
        return largest([self._predict(knobs, each, whole=whole) for each in (self.kinds if kind is None else (kind,))])

    def _predict(self, knobs: Knobs, kind: StepKind, *, whole: bool) -> Prediction:
        few, others = (self.batches, ()) if whole else self._few(knobs)
        sizes = self.sizes(knobs)
        beside = sum(sizes.batch_bytes(batch) for batch in others)
        longest, width = max(batch.n_tokens for batch in self.batches), self.shape.facts.hidden_size
        taught = self.teacher.pass_bytes(longest, width=width) if self.teacher is not None else 0
        return predict(
            self.arranged(knobs, len(few), kind),
            sizes,
            few,
            library_bytes=self.library_bytes,
            evaluation=self.evaluation,
            beside_bytes=beside,
            teaching_bytes=taught,
        )

    def seconds(self, knobs: Knobs, *, kind: StepKind | None = None) -> StepSeconds:
        """The time of the largest step, in the mean over the kinds of step, or of one of them."""
        found = [self._seconds(knobs, each) for each in (self.kinds if kind is None else (kind,))]
        if len(found) == 1:
            return found[0]

        def mean(name: str) -> float:
            return sum(share * float(getattr(each, name)) for share, each in zip(self.course.shares, found, strict=True))

        return StepSeconds(mean("seconds"), mean("compute_seconds"), round(mean("bytes_up")), round(mean("bytes_down")))

    def _seconds(self, knobs: Knobs, kind: StepKind) -> StepSeconds:
        few, others = self._few(knobs)
        plan = self.arranged(knobs, len(few), kind)
        if not others:
            return step_seconds(plan, self.sizes(knobs), few, self.profile)
        alike = (_mean(others),) * len(few)
        found, each = seconds_with_passes(plan, self.sizes(knobs), few, self.profile, others=alike)
        times = len(others) / len(few)
        return StepSeconds(
            found.seconds + times * each.seconds,
            found.compute_seconds + times * each.compute_seconds,
            found.bytes_up + round(times * each.bytes_up),
            found.bytes_down + round(times * each.bytes_down),
        )

    def timed(self, knobs: Knobs) -> tuple[MicroBatchSize, ...]:
        """The micro-batches whose seconds `seconds` adds up."""
        few, others = self._few(knobs)
        return (*few, *(_mean(others),) * len(others)) if others else few


def arranged_plan(method: str, kind: StepKind, knobs: Knobs, *, n_micro_batches: int, part: Part | None) -> Plan:
    """The plan of one kind of step as a process runs it: written, cut to its part of a pipeline, tensors in their place.

    `knobs` are that process' own. The plan is not validated: the search makes many.
    """
    whole = replace(knobs, token_tile=TOKEN_TILES[0], mlp_block=MLP_PIECES[0], mlp_tile=MLP_PIECES[1])
    plan = _arranged(method, kind, whole, n_micro_batches, part)
    return plan if whole == knobs else in_pieces(plan, knobs)


@lru_cache(maxsize=64)  # a combination's bytes are asked for after its seconds, and those of its other pieces
def _arranged(method: str, kind: StepKind, knobs: Knobs, n_micro_batches: int, part: Part | None) -> Plan:
    plan = step_plan(method, kind, n_micro_batches=n_micro_batches)
    return arrange(plan if part is None else cut_for_process(plan, part), knobs)


def _mean(batches: tuple[MicroBatchSize, ...]) -> MicroBatchSize:
    first, n = batches[0], len(batches)
    if all(batch == first for batch in batches):
        return first
    n_tokens = round(sum(batch.n_rows for batch in batches) / n / first.n_sequences)
    lengths = sorted(length for batch in batches for length in batch.in_a_row)
    n_supervised = round(sum(batch.n_supervised for batch in batches) / n)
    rows = tuple(lengths[n // 2 :: n])
    return MicroBatchSize(first.n_sequences, n_tokens, n_supervised, in_a_row=rows, scored=first.scored)
