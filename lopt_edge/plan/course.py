"""The course of a run: which kinds of step a method takes, and which kind each step is.

A method may have several kinds of step (LCSB one for each group of layers, SegProp one for each stage), each with a plan of
its own. Which one step n is depends on n and the number of steps only, so that a resumed run takes the same ones. A run
must hold the largest kind; its mean step takes the kinds by their share. No torch, no settings: methods/ makes courses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from lopt_edge.errors import InputError
from lopt_edge.plan.step import GroupName, StepKind, groups_of


@dataclass(frozen=True)
class Phase:
    """`cycle` names kinds, taken in turn, until this share of the run's steps is over."""

    until: float
    cycle: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """`kinds` by name in the order of their first step; `drawn` makes the kind of a step where no cycle says it.

    `also`: groups that train in drawn kinds only.
    """

    method: str
    kinds: tuple[StepKind, ...]
    phases: tuple[Phase, ...] = ()
    drawn: Callable[[int], StepKind] | None = None
    also: tuple[GroupName, ...] = ()

    def kind(self, step: int, n_steps: int) -> StepKind:
        """Of step `step`, counted from 1."""
        if self.drawn is not None:
            return self.drawn(step)
        if not self.phases:
            return self.kinds[0]
        begun = 0
        for phase in self.phases:
            end = ceil(phase.until * n_steps)
            if step <= end or phase is self.phases[-1]:
                return self.named[phase.cycle[(step - 1 - begun) % len(phase.cycle)]]
            begun = end
        raise AssertionError("a course has a last phase")

    @cached_property
    def named(self) -> dict[str, StepKind]:
        return {kind.name: kind for kind in self.kinds}

    @cached_property
    def groups(self) -> tuple[GroupName, ...]:
        """All parameter groups of the run, layers first."""
        found = {group for kind in self.kinds for segment in kind.segments for group in groups_of(segment)}
        found |= {*self.also, *(group for kind in self.kinds for group in kind.resting)}
        return tuple(sorted(found, key=lambda group: (group[0] != "layer", group[1])))

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """The layers that train at some time."""
        return tuple(target for unit, target in self.groups if unit == "layer")

    @cached_property
    def averaged(self) -> tuple[int, ...]:
        """The layers of which an average of the adapters is kept."""
        return tuple(sorted({layer for kind in self.kinds for segment in kind.segments for layer in segment.tail}))

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Of the kinds, in the steps of a long run."""
        if not self.phases:
            return (1 / len(self.kinds),) * len(self.kinds)
        found = dict.fromkeys(self.named, 0.0)
        begun = 0.0
        for phase in self.phases:
            for name in phase.cycle:
                found[name] += (phase.until - begun) / len(phase.cycle)
            begun = phase.until
        return tuple(found[kind.name] for kind in self.kinds)


FILL, READ = "fill", "read"  # kinds of step of a course with a boundary cache


def cached(course: Course, *, epochs: int) -> Course:
    """The same method with its boundary kept: a step fills the cache or reads it, as its examples are there or not.

    Which one is known when the step comes; the shares here are those of a run that begins with an empty cache.
    """
    (kind,) = course.kinds
    boundary = kind.segments[-1].first
    if boundary == 0:
        raise InputError("there is no boundary: all layers train", where="boundary_cache", fix="leave it out")
    fill, read = replace(kind, name=FILL, writes=boundary), replace(kind, name=READ, reads=boundary)
    return replace(course, kinds=(fill, read), phases=(Phase(1 / epochs, (FILL,)), Phase(1.0, (READ,))))
