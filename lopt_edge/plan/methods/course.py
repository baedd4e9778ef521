"""The course of a run: which kinds of step a method takes, and which kind each step is.

A method may have several kinds of step (LCSB one for each group of layers, SegProp one for each stage), each with a plan of
its own. Which one step n is depends on n, the number of steps and the phases that ended early only, so that a resumed run
takes the same ones. A run must hold the largest kind; its mean step takes the kinds by their share. No torch, no settings:
methods/ makes courses.

With a boundary cache a kind whose early segments do not train comes in two forms: one computes the boundary and fills the
cache, one reads it. Which one a step takes is known when it comes (are its examples there?), not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from lopt_edge.errors import InputError
from lopt_edge.plan.schedule.build import StepKind, groups_of
from lopt_edge.plan.schedule.ops import GroupName

FILL, READ = "fill", "read"  # the two forms
MANY_STEPS = 0.05  # of an epoch: a phase that reads less than so much of it again fills no cache


@dataclass(frozen=True)
class Phase:
    """A part of a run. `cycle` names kinds of step, taken in turn, until this share of the run's steps is over."""

    until: float
    cycle: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """The kinds of step that a run takes, and which step is of which.

    `kinds` by name in the order of their first step; `drawn` makes the kind of a step where no cycle names it. `also`:
    groups that train in drawn kinds only. `restarts`: each phase has a learning-rate schedule of its own, and may end
    early. `epochs`: passes over the data, for the share of steps that fill a cache. `patience`: a phase ends after so many
    evaluations in a row without a lower held-out loss. `align_weight`: of an alignment beside the task, at the first step;
    `local_fades`: the local losses' rates fall linearly until their phase is over. `ema_momentum`, `cascade_weight`: of the
    averages that a tail is read through, and the share of a loss that crosses into the segment before. `smaller`: the
    course of another method, to be named where this one does not fit. `settles`: layers train in one phase and rest in a
    later one, so what lies before a boundary is known when that begins. `keeps`: such a boundary is cached of itself where
    a later epoch reads it. `closes_itself`: the first phase ends early once the training loss falls no more as it did.
    `advice`: sentences on what is known to go wrong at this depth, for before a run.
    """

    method: str
    kinds: tuple[StepKind, ...]
    phases: tuple[Phase, ...] = ()
    drawn: Callable[[int], StepKind] | None = None
    also: tuple[GroupName, ...] = ()
    restarts: bool = False
    epochs: float = 1.0
    patience: int | None = None
    align_weight: float = 0.0
    local_fades: bool = False
    ema_momentum: float = 0.0
    cascade_weight: float = 1.0
    smaller: Course | None = None
    settles: bool = False
    keeps: bool = False
    closes_itself: bool = False
    advice: tuple[str, ...] = ()

    def kind(self, step: int, n_steps: int, *, ended: Sequence[int] = ()) -> StepKind:
        """The kind of step `step`, counted from 1; of the two forms that a cache gives, the one that fills it.

        `ended`: the last steps of the phases that ended early.
        """
        if self.drawn is not None:
            return self.drawn(step)
        if not self.phases:
            return self.kinds[0]
        index, first, _ = self.phase(step, n_steps, ended=ended)
        cycle = self.phases[index].cycle
        return self._planned(cycle[(step - first) % len(cycle)])[0]

    def phase(self, step: int, n_steps: int, *, ended: Sequence[int] = ()) -> tuple[int, int, int]:
        """The phase of a step: (index, its first step, its last step). The steps that an early end leaves are shared
        evenly."""
        begun, n_ended = (ended[-1] if ended else 0), len(ended)
        later = self.phases[n_ended:]
        shares = [(i + 1) / len(later) for i in range(len(later))] if ended else [phase.until for phase in later]
        ends = [*ended, *(begun + ceil(share * (n_steps - begun)) for share in shares)]
        index = next((i for i, end in enumerate(ends) if step <= end), len(ends) - 1)
        return index, (ends[index - 1] if index else 0) + 1, ends[index]

    def reading(self, kind: StepKind) -> StepKind:
        """The form that reads a cache, of a kind that fills it."""
        return self.named[kind.name.removesuffix(FILL) + READ]

    def _planned(self, name: str) -> tuple[StepKind, ...]:
        """The kind of that name, or its two forms."""
        if name in self.named:
            return (self.named[name],)
        return self.named[_form(name, FILL)], self.named[_form(name, READ)]

    @cached_property
    def named(self) -> dict[str, StepKind]:
        """The kinds of step by name."""
        return {kind.name: kind for kind in self.kinds}

    @cached_property
    def groups(self) -> tuple[GroupName, ...]:
        """The parameter groups of the run, layers first."""
        found = {group for kind in self.kinds for segment in kind.segments for group in groups_of(segment)}
        found |= {*self.also, *(group for kind in self.kinds for group in kind.resting)}
        return tuple(sorted(found, key=lambda group: (group[0] != "layer", group[1])))

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """The layers that train at some time."""
        return tuple(target for unit, target in self.groups if unit == "layer")

    @cached_property
    def replaced(self) -> tuple[int, ...]:
        """The layers without weights of their own."""
        return tuple(sorted({layer for kind in self.kinds for segment in kind.segments for layer in segment.replaced}))

    @cached_property
    def averaged(self) -> tuple[int, ...]:
        """The layers of which an average of the adapters is kept."""
        return tuple(sorted({layer for kind in self.kinds for segment in kind.segments for layer in segment.tail}))

    @property
    def learns_before(self) -> bool:
        """Whether the layers before a cached boundary have learned in the run: the cache is of their values, too."""
        return self.restarts or self.settles

    @property
    def caches(self) -> bool:
        """Whether some kind of step fills a boundary cache."""
        return any(kind.writes is not None for kind in self.kinds)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The share of each kind in the steps of a long run that begins with an empty cache."""
        found = dict.fromkeys(self.named, 0.0)
        begun = 0.0
        for phase in self.phases or (Phase(1.0, (self.kinds[0].name,)),):
            for name in phase.cycle:
                forms, share = self._planned(name), (phase.until - begun) / len(phase.cycle)
                first = 1.0 if len(forms) == 1 else min(1.0, 1 / (self.epochs * (phase.until - begun)))
                for form, part in zip(forms, (first, 1 - first), strict=False):
                    found[form.name] += part * share
            begun = phase.until
        return tuple(found[kind.name] for kind in self.kinds)


def cached(course: Course, *, epochs: float) -> Course:
    """The same course with its boundaries kept. Raises InputError if there is none.

    Of a course that settles those are kept that a later epoch reads, and the last one, for later runs.
    """
    last = {course.phases[-1].cycle[0]} if course.phases else set()
    found = _with_caches(course, epochs, names=_read_again(course, epochs) | last if course.settles else None)
    if not found.caches:
        raise InputError("there is no boundary: all layers train", where="boundary_cache", fix="leave it out")
    return found


def kept_while_read(course: Course, *, epochs: float) -> Course:
    """The same course, where a closed boundary is kept as long as a later epoch of the run reads it."""
    names = _read_again(course, epochs)
    return _with_caches(course, epochs, names=names) if course.keeps and names else course


def _read_again(course: Course, epochs: float) -> set[str]:
    """The kinds of step of the phases that come by an example more than once."""
    begins = (0.0, *(phase.until for phase in course.phases))
    return {
        phase.cycle[0]
        for phase, begin in zip(course.phases, begins, strict=False)
        if epochs * (phase.until - begin) > 1 + MANY_STEPS
    }


def _with_caches(course: Course, epochs: float, *, names: set[str] | None) -> Course:
    """The course with two forms of each kind that has a boundary; `names`: of these alone."""
    kinds: list[StepKind] = []
    for kind in course.kinds:
        boundary = kind.segments[-1].first if names is None or kind.name in names else 0
        forms = (
            replace(kind, name=_form(kind.name, FILL), writes=boundary),
            replace(kind, name=_form(kind.name, READ), reads=boundary),
        )
        kinds += forms if boundary else (kind,)
    phases = course.phases or (Phase(1.0, (course.kinds[0].name,)),)
    return replace(course, kinds=tuple(kinds), phases=phases, epochs=epochs)


def _form(name: str, form: str) -> str:
    return f"{name}-{form}" if name else form
