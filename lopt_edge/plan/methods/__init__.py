"""Methods: how far a gradient reaches. Each file opens with its paper, its definition, and where we deviate.

A method turns a model's depth and its own options into a course (course.py): segments with losses, in one or several
kinds of step. The op list, paging, memory, checkpoints are the same for all of them. `OPTIONS` says which options belong to
which methods: any other combination is refused (config.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lopt_edge.plan.methods import e2e, frozen, lcsb, let, lopt, mlaan, repl, segprop, top_layers
from lopt_edge.plan.methods.course import cached

if TYPE_CHECKING:
    from lopt_edge.config.settings import Config
    from lopt_edge.plan.methods.course import Course

Make = Callable[["Config", int], "Course"]
METHODS: Mapping[str, Make] = {
    "lopt": lopt.course,
    "e2e": e2e.course,
    "frozen": frozen.course,
    "top-layers": top_layers.course,
    "lcsb": lcsb.course,
    "segprop": segprop.course,
    "let": let.course,
    "let-local": let.local_course,
    "repl": repl.course,
    "mlaan": mlaan.course,
}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "boundary": ("lopt",),
    "boundary_update": ("lopt",),
    "local_every": ("lopt",),
    "local_loss": ("lopt",),
    "open_every": ("lopt",),
    "train_layers": ("top-layers",),
    "selection": ("lcsb",),
    "select_ratio": ("lcsb",),
    "unselected": ("lcsb",),
    "teacher": ("let", "let-local", "lopt"),
    "align_until": ("let", "let-local"),
    "align_weight": ("let",),
    "align_layer": ("let",),
    "stages": ("segprop",),
    "tail_layers": ("segprop",),
    "stage_patience": ("segprop",),
    "replace_layers": ("repl",),
    "leap_layers": ("mlaan",),
    "ema_momentum": ("mlaan",),
    "cascade_weight": ("mlaan",),
}
DEFAULTS: Mapping[str, Mapping[str, int]] = {"mlaan": {"num_segments": mlaan.NUM_SEGMENTS}}  # other than for all methods
# They ask for a boundary: LoPT's, where no method is named.
BOUNDARY_SETTINGS = ("num_segments", "boundary_layers", "boundary", "boundary_update", "choose_segments", "local_every",
                     "local_loss", "local_weight", "lr_local", "open_every")  # fmt: skip
CUT_METHODS = ("lopt", "frozen", "let-local", "mlaan")  # whose depth num_segments or boundary_layers cut
PIPELINED = ("lopt", "frozen")  # whose segments may lie in several processes
CACHED = ("frozen", "top-layers", "lopt", "segprop")  # that may have early segments which never train


def course_of(config: Config, n_layers: int) -> Course:
    """The course of a run with these settings. Raises InputError for what this depth does not allow."""
    found = METHODS[config.method](config, n_layers)
    return found if config.boundary_cache is None else cached(found, epochs=config.epochs)
