"""Frozen: the early segments do not train at all; the last one learns the task. The honest control of LoPT.

With the boundary b:   h_b = f_b .. f_1 (h_0), detached, without adapters;   L(f_n .. f_(b+1) (h_b)) trains layers b+1 .. n.

Whatever a local loss does for the early layers must beat this at the same bytes and seconds. It is cut as LoPT is (our own
control; the LoPT paper, arXiv 2605.04913, has "upper half only" as an ablation). Since the boundary never changes, it can
be computed once for each example (`--boundary-cache`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import cut_depth

if TYPE_CHECKING:
    from lopt_edge.config.settings import Config


def course(config: Config, n_layers: int) -> Course:
    segments = cut_depth(
        "none", n_layers=n_layers, num_segments=config.num_segments, boundary_layers=config.boundary_layers
    )
    return Course("frozen", (StepKind("", segments),))
