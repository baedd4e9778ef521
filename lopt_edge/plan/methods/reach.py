"""Reach: how many of the last layers the task's gradient enters, as a schedule over the steps of a run.

A step of reach r trains the last r layers on the task; a boundary lies before them. Every schedule of reach is one list of
phases: `0.1:all,0.3:3/4,1.0:half` says all layers for the first tenth of the steps, three quarters of them up to three
tenths, half of them to the end. A depth is `all`, `half` (as LoPT's two segments), a share (`3/4`) or a number of layers
(`6`); `0.5:all..half` moves from one to the other in `STAGES` equal steps, so layers close one group after another from
the bottom, as FreezeOut closes them (arXiv 1706.04983, whose layers have a time and a rate of their own each).

`auto` closes half of the depth by itself, at the latest at half of the run: as soon as a stretch of steps (a twentieth of
the run) has lowered the training loss by less than a twentieth of all that it has fallen. So it is open while the task's
first, large part is learned. The norm of e2e's gradient was looked at instead: on SmolLM2-135M it falls to a third within
ten steps, on the embedded model, where `open_until` pays, not at all. How `auto` compares has not been measured.

What follows from a schedule is here: layers that are never reached have no adapters (`none`), those that are not reached
now rest, and those that were and never will be again are closed: their moments are let go (run/step/optim.py), and their
boundary may be kept (course.py). No schedule is better than another here; docs/methods.md says what was measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lopt_edge.errors import InputError
from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment

AUTO, AUTO_PHASES = "auto", "0.5:all,1:half"
STAGES = 5  # of `all..half`, both ends among them: each is a kind of step with a plan of its own
OPEN = "open"  # the kind of step that reaches all layers
MOST_ENTRIES = 16
_DEPTH = r"all|half|\d{1,4}(?:/\d{1,4})?"
_ENTRY = re.compile(rf"(\d+(?:\.\d+)?|\.\d+):({_DEPTH})(?:\.\.({_DEPTH}))?")
FORM = "write auto, or UNTIL:DEPTH,... e.g. 0.1:all,0.3:3/4,1:half or 0.1:all,0.5:all..half,1:half"


class Entry(NamedTuple):
    """An entry of a schedule: up to which share of the steps, from which depth to which, as text."""

    until: float
    first: str
    last: str


def parse(text: str) -> tuple[Entry, ...]:
    """The entries of a schedule's text. Raises InputError for what no model could take."""
    parts = [part.strip() for part in (AUTO_PHASES if text.strip() == AUTO else text).split(",")]
    found: list[Entry] = []
    for part in parts[:MOST_ENTRIES]:
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise InputError(f"{part[:40]!r} is not UNTIL:DEPTH", where="reach", fix=FORM)
        found.append(Entry(float(match[1]), match[2], match[3] or match[2]))
    ends = [entry.until for entry in found]
    if len(parts) > MOST_ENTRIES or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
        what = f"the shares of the run {', '.join(f'{end:g}' for end in ends)} must rise, from above 0 to 1"
        raise InputError(what, where="reach", fix=f"use at most {MOST_ENTRIES}; the last one is 1")
    return tuple(found)


def depth(text: str, n_layers: int) -> int:
    """The number of layers that a depth means. Raises InputError for none, or more than the model has."""
    if text == "all":
        return n_layers
    if text == "half":  # as cut_depth cuts: the remainder belongs to the early ones
        found = n_layers // 2
    else:
        number, _, parts = text.partition("/")
        found = round(int(number) * n_layers / (int(parts) or 1)) if parts else int(number)
    if not 1 <= found <= n_layers:
        what = f"{text} is {found} of the model's {n_layers} layers"
        raise InputError(what, where="reach", fix=f"choose 1 to {n_layers} layers, all, half, or a share such as 3/4")
    return found


def boundaries(entries: Sequence[Entry], n_layers: int) -> list[tuple[float, int]]:
    """The (share of the run, first layer that is reached) of each phase; what stays the same is one phase."""
    found: list[tuple[float, int]] = []
    begun = 0.0
    for until, first, last in entries:
        top, bottom = depth(first, n_layers), depth(last, n_layers)
        n_stages = 1 if top == bottom else STAGES
        for stage in range(n_stages):
            reached = round(top + (bottom - top) * stage / max(1, n_stages - 1))
            end = until if stage == n_stages - 1 else begun + (until - begun) * (stage + 1) / n_stages
            if found and found[-1][1] == n_layers - reached:
                found.pop()
            found.append((end, n_layers - reached))
        begun = until
    return found


def course(text: str, n_layers: int, *, method: str, keeps: bool) -> Course:
    """The course of a schedule: a kind of step for each depth that it reaches. `keeps`: a closed boundary may be cached.

    Raises InputError for what is no schedule, or none of this depth.
    """
    phases = boundaries(parse(text), n_layers)
    firsts = [first for _, first in phases]
    lowest = min(firsts)
    kinds = {
        _name(first, n_layers): StepKind(
            _name(first, n_layers), segments_from(first, lowest, n_layers), closed=_closed(firsts[:i], firsts[i:])
        )
        for i, first in reversed(list(enumerate(firsts)))  # of a depth that comes again, the first time: less is closed
    }
    names = [_name(first, n_layers) for first in firsts]
    if len(kinds) == 1:
        return Course(method, (StepKind("", kinds[names[0]].segments),))
    return Course(
        method,
        tuple(kinds[name] for name in dict.fromkeys(names)),
        tuple(Phase(end, (name,)) for (end, _), name in zip(phases, names, strict=True)),
        settles=True,
        keeps=keeps,
        closes_itself=text.strip() == AUTO,
    )


def segments_from(first: int, lowest: int, n_layers: int) -> tuple[Segment, ...]:
    """The segments of a step that reaches the layers from `first` on, where no step reaches those before `lowest`."""
    parts = [(0, lowest, "none"), (lowest, first, "rest"), (first, n_layers, "task")]
    there = [(begin, end, loss) for begin, end, loss in parts if begin < end]
    return tuple(Segment(index, begin, end - 1, loss) for index, (begin, end, loss) in enumerate(there))  # type: ignore[arg-type]


def _closed(before: Sequence[int], later: Sequence[int]) -> int:
    """The layers before this one have trained, if ever, and train no more."""
    return min(later) if before and min(later) > min(before) else 0


def _name(first: int, n_layers: int) -> str:
    return OPEN if first == 0 else f"last-{n_layers - first}"
