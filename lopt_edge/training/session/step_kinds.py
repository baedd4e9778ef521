"""Which kind of step a run takes next, at which learning rates: the course (plan/methods/course.py) as one run lives it.

The course has what a step's number decides. Here comes what the run itself decides: whether a boundary cache has the
step's examples, and stages that end early on the held-out loss. Both are functions of the run's state and its data, so a
resumed run decides as the undisturbed one did.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from statistics import mean

from lopt_edge.data import Window
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.ops import GroupName
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.optim import learning_rate
from lopt_edge.run.step.step_state import Rates
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.prepare.boundary_cache import BoundaryCaches
from lopt_edge.training.prepare.inputs import Inputs

STRETCH, LEAST_GAIN = 0.05, 0.05  # of the run's steps; of the whole fall of the loss: less in a stretch closes (reach.py)


@dataclass(frozen=True)
class Closing:
    """The losses of the first stretch of steps and of the last two, and why the boundary closes (empty: it does not)."""

    first: list[float]
    last: list[float]
    why: str = ""


@dataclass(frozen=True)
class Stage:
    """The standing of a stage: its index, its lowest held-out loss, for how many evaluations that stands, and its end."""

    index: int
    loss: float
    waits: int
    over: str = ""


class StepKinds:
    """The kinds of step as this run takes them; it reads the state and writes none."""

    def __init__(self, inputs: Inputs, state: RunState, executor: Executor, caches: BoundaryCaches | None) -> None:
        self.inputs, self.state, self.executor, self.caches = inputs, state, executor, caches
        self.n_read = 0  # steps of this session that read a boundary cache

    def of(self, step: int, window: Window) -> StepKind:
        """The kind of a step over this window; the executor is given the cache that it needs."""
        kind = self._planned(step)
        if self.caches is None or kind.writes is None:
            return kind
        cache = self.caches.of(kind, self.executor)
        self.executor.caches["boundary"] = cache
        if not all(cache.has(indices) for indices in window):
            return kind
        self.n_read += 1
        return self.inputs.course.reading(kind)

    def _planned(self, step: int) -> StepKind:
        return self.inputs.course.kind(step, self.inputs.n_steps, ended=self.state.stage_ends)

    def rates(self, step: int, kind: StepKind) -> Rates:
        """The learning rates by segment: the task's where the gradient is the task's, else `lr_local`; heads by group."""
        config, course, n_steps = self.inputs.config, self.inputs.course, self.inputs.n_steps
        if course.restarts:  # each stage has a schedule of its own
            _, first, last = course.phase(step, n_steps, ended=self.state.stage_ends)
            step, n_steps = step - first + 1, last - first + 1
        rates: dict[int | GroupName, float] = {}
        for segment in kind.segments:
            if segment.trains:
                fades = segment.is_local and course.local_fades  # linearly, until its phase is over
                last = course.phase(step, n_steps)[2] if fades else n_steps
                peak = config.local_lr if segment.is_local else config.lr
                rates[segment.index] = self._rate(step, peak, n_steps=last, fades=fades)
            if segment.has_head:
                rates["aux", segment.index] = self._rate(step, config.head_lr, n_steps=n_steps)
        return rates

    def _rate(self, step: int, peak: float, *, n_steps: int, fades: bool = False) -> float:
        config = self.inputs.config
        return learning_rate(
            step,
            n_steps=n_steps,
            peak=peak,
            schedule="linear" if fades else config.schedule,
            warmup_ratio=config.warmup_ratio,
            cycles=1 if fades else config.cycles,
            lowest=0.0 if fades else config.min_lr,
        )

    def align_weight(self, step: int) -> float:
        """The weight of an alignment beside the task (LET): it falls linearly to 0 at the end of the first phase."""
        course = self.inputs.course
        if not course.phases:
            return 0.0
        index, _, last = course.phase(step, self.inputs.n_steps)
        return 0.0 if index else course.align_weight * (1 - (step - 1) / last)

    def layers(self, step: int) -> tuple[int, ...] | None:
        """The layers that an evaluation after this step runs: a stage's network; None for all of them."""
        if not 0 < step < self.inputs.n_steps:
            return None
        absent = {layer for segment in self._planned(step).segments for layer in segment.absent}
        return tuple(layer for layer in range(self.inputs.source.facts.n_layers) if layer not in absent) if absent else None

    def closing(self, step: int, loss: float) -> Closing:
        """What is kept after a step with this loss to see whether the boundary closes, and why it does, if so."""
        state, course, n_steps = self.state, self.inputs.course, self.inputs.n_steps
        if not course.closes_itself or state.stage_ends or step >= course.phase(step, n_steps)[2]:
            return Closing([], [])
        n = max(2, ceil(STRETCH * n_steps))
        first, last = [*state.first_losses, loss][:n], [*state.last_losses, loss][-2 * n :]
        if len(last) < 2 * n:
            return Closing(first, last)
        begun, before, now = mean(first), mean(last[:n]), mean(last[n:])
        if before - now >= LEAST_GAIN * (begun - now):
            return Closing(first, last)
        why = f"the boundary closes after step {step}: the loss fell from {begun:.3g} to {now:.3g}, and hardly does now"
        return Closing([], [], why)

    def stage_after(self, step: int, loss: float | None) -> Stage | None:
        """The standing of a stage after an evaluation; None where nothing can end it, and nothing changes."""
        state, patience = self.state, self.inputs.course.patience
        if patience is None or loss is None or not step:
            return None
        index, _, last = self.inputs.course.phase(step, self.inputs.n_steps, ended=state.stage_ends)
        if index == len(self.inputs.course.phases) - 1 or step == last:
            return None
        if state.stage != index or state.stage_loss is None or loss < state.stage_loss:
            return Stage(index, loss, 0)
        waits = state.stage_waits + 1
        before = f"its held-out loss was lower before ({state.stage_loss:.4f})"
        over = "" if waits < patience else f"stage {index + 1} ends after step {step}, not {last}: {before}"
        return Stage(index, state.stage_loss, waits, over)
