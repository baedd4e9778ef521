"""Top layers: only the last N layers train (`--train-layers N`), the others have no adapters. A control, as `frozen`.

With m = n - N:   h_m = f_m .. f_1 (h_0), detached;   L(f_n .. f_(m+1) (h_m)) trains layers m+1 .. n.

It is `frozen` with the boundary counted from the end. N = n is `e2e`. No paper: it is what practitioners do by hand.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from lopt_edge.errors import InputError
from lopt_edge.plan.methods import method
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.methods.method import Method, Problem, RunSettings
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment


class Options(method.Options):
    """The options of top-layers: how many layers train."""

    train_layers: int | None = Field(None, ge=1, description="top-layers: how many of the last layers train")


def course(options: Options, n_layers: int) -> Course:
    """The course where only the last layers train. Raises InputError for more layers than there are."""
    wanted = options.train_layers
    if wanted is None:
        raise InputError("is needed by method top-layers", where="train_layers", fix=f"choose 1 to {n_layers}")
    if wanted > n_layers:
        raise InputError(
            f"{wanted} is more than the model's {n_layers} layers", where="train_layers", fix=f"choose 1 to {n_layers}"
        )
    first = n_layers - wanted
    early = (Segment(0, 0, first - 1, "none"),) if first else ()
    return Course("top-layers", (StepKind("", (*early, Segment(len(early), first, n_layers - 1, "task"))),))


def problems(options: Options, _run: RunSettings) -> Iterator[Problem]:
    """The problem of a missing number of layers, which must be given."""
    if options.train_layers is None:
        yield Problem("train_layers", "is needed by method top-layers", "say how many of the last layers train")


METHODS = (Method("top-layers", Options, course, problems, uncut="top-layers cuts at train_layers", caches=lambda _: True),)
