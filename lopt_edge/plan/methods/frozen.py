"""Frozen: the early segments do not train at all; the last one learns the task. The honest control of LoPT.

With the boundary b:   h_b = f_b .. f_1 (h_0), detached, without adapters;   L(f_n .. f_(b+1) (h_b)) trains layers b+1 .. n.

Whatever a local loss does for the early layers must beat this at the same bytes and seconds. It is cut as LoPT is (our own
control; the LoPT paper, arXiv 2605.04913, has "upper half only" as an ablation). Since the boundary never changes, it can
be computed once for each example (`--boundary-cache`).
"""

from __future__ import annotations

from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.methods.method import Method, Options
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import cut_depth


def course(options: Options, n_layers: int) -> Course:
    """The course where the early segments have no loss and the last one has the task's."""
    segments = cut_depth(
        "none", n_layers=n_layers, num_segments=options.num_segments, boundary_layers=options.boundary_layers
    )
    return Course("frozen", (StepKind("", segments),))


METHODS = (Method("frozen", Options, course, cuts=True, pipelined=True, caches=lambda _: True),)
