"""LCSB (arXiv 2602.13073): the forward is exact; in the backward only a subset of the layers computes gradients.

A layer is h_i = h_(i-1) + r_i(h_(i-1)). For the subset S of this step, from the end of the depth:

    i in S:      dA_i, dB_i and g_(i-1) = (d h_i / d h_(i-1))^T g_i, exactly
    i not in S:  g_(i-1) = g_i       (the residual path alone; no fetch, no saved input, no recomputation)

so gradients below an unselected layer are approximations. Two selections (`--selection`), both of a share `--select-ratio`
of the layers: `cyclic`, where with G = 1 / ratio groups step t takes the layers i with i mod G = t mod G; `uniform`, a draw
for each step that is a function of the seed and the step. Each group has a plan of its own.

What happens to unselected layers (`--unselected`): `move`, the paper's, updates them with a zero gradient, so that AdamW's
momentum and decay go on; `rest` leaves them and their moments as they are.

Where we deviate: nothing is propagated below the lowest selected layer, since nobody reads it. The paper's code is not
public: groups are strided through the depth here (a contiguous block would leave whole regions without exact neighbours).

Depth breaks it. On the embedded model (8 layers) it comes near `frozen`; on SmolLM2-135M (30 layers, one seed, untuned) the
first update raised the loss from 3.11 to 3.91, and the run ended at a held-out 2.59 where e2e reached 1.30. It is not the
code: its gradients equal an independent single graph of the formula to 1e-6. Their cosine with the true gradient is 0.29 to
0.63 where few layers are selected. What it would need on a deep model has not been found.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Literal

from pydantic import Field

from lopt_edge.errors import InputError
from lopt_edge.plan.methods import method
from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.methods.method import Method
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment

MOST_OFF = 0.02  # of a share that cyclic groups cannot have exactly
DEPTH_TRIED = 8  # layers of the deepest model on which it has not failed
TOO_DEEP = (
    "lcsb has failed on a deep model (30 layers: the first update raised the loss from 3.11 to 3.91, and it ended far "
    "above e2e): watch the first losses, or take e2e or frozen"
)


class Options(method.Options):
    """The options of lcsb: which layers have a backward in a step, and what becomes of the others."""

    selection: Literal["cyclic", "uniform"] = Field("cyclic", description="lcsb: layers in turn, or drawn for each step")
    select_ratio: float = Field(0.5, gt=0, le=1, description="lcsb: share of the layers with a backward in a step")
    unselected: Literal["move", "rest"] = Field("move", description="lcsb: momentum moves the others, or they rest")


def course(options: Options, n_layers: int) -> Course:
    """The course where some of the layers have a backward, others in each step. Raises InputError for what a depth does not
    allow."""
    if options.selection == "uniform":
        n_selected = max(1, round(options.select_ratio * n_layers))
        drawn = partial(_drawn, options, n_layers, n_selected)
        # the planner's stand-ins: evenly spread from the first layer on, where the gradient goes furthest; and the last
        # layers, which are the ones whose graphs are kept where only some are
        widest = tuple(sorted({i * n_layers // n_selected for i in range(n_selected)}))
        last = tuple(range(n_layers - n_selected, n_layers))
        shown = _kind(options, n_layers, widest, "uniform"), _kind(options, n_layers, last, "uniform-last")
        every = tuple(("layer", layer) for layer in range(n_layers))
        return Course("lcsb", shown, drawn=drawn, also=every, advice=_advice(n_layers, n_selected))
    if abs(1 / max(1, round(1 / options.select_ratio)) - options.select_ratio) > MOST_OFF:
        raise InputError(
            f"cyclic takes one layer in 1, 2, 3, ..., which {options.select_ratio:g} is not near",
            where="select_ratio",
            fix="choose 1, 0.5, 0.33, 0.25, ..., or --selection uniform",
        )
    n_groups = min(n_layers, max(1, round(1 / options.select_ratio)))
    groups = [tuple(range(group, n_layers, n_groups)) for group in range(n_groups)]
    kinds = tuple(_kind(options, n_layers, group, f"group-{i}") for i, group in enumerate(groups))
    phases = (Phase(1.0, tuple(kind.name for kind in kinds)),)
    return Course("lcsb", kinds, phases, advice=_advice(n_layers, len(groups[0])))


def _advice(n_layers: int, n_selected: int) -> tuple[str, ...]:
    return (TOO_DEEP,) if n_layers > DEPTH_TRIED and n_selected < n_layers else ()


def _kind(options: Options, n_layers: int, selected: tuple[int, ...], name: str) -> StepKind:
    through = tuple(layer for layer in range(n_layers) if layer not in selected)
    resting = tuple(("layer", layer) for layer in through) if options.unselected == "move" else ()
    return StepKind(name, (Segment(0, 0, n_layers - 1, "task", through=through),), resting=resting)


def _drawn(options: Options, n_layers: int, n_selected: int, step: int) -> StepKind:
    pick = random.Random(f"lcsb {options.seed} {step}")
    return _kind(options, n_layers, tuple(sorted(pick.sample(range(n_layers), n_selected))), "uniform")


METHODS = (Method("lcsb", Options, course),)
