"""SegProp (ICLR 2026 submission 12239, TMLR 7218): stage by stage, one segment trains together with the final layers.

The last T layers are the tail ("global head": with the frozen norm and lm_head it carries the task loss in every stage);
the layers before it are the body, cut into S segments B_1 .. B_S. Stage s trains B_s and the tail on

    task( tail( B_s( stop( B_(s-1) .. B_1 (h_0) ) ) ) )

B_1 .. B_(s-1) are finished: they run with the adapters that they have learned and change no more, so with
`--boundary-cache` their output is computed once for each example of a stage.

The reading that is implemented: a stage's network ends where it has come to. B_(s+1) .. B_S are not run at all in stage s
(the paper grows the network; the other reading, in which they run frozen and gradients cross them, would cost what `e2e`
costs). So the last stage is the first that runs the whole depth, and the tail learns at every depth in turn. Only the
tail's optimizer states go on from stage to stage.

All stages together take as many steps, so as many tokens, as any other method. Each has an equal share of them and a
learning-rate schedule of its own. With `--stage-patience N` a stage ends after N evaluations in a row without a lower
held-out loss (of the stage's own network); the steps that are left are shared by the later stages. Evaluations between
stages measure the stage's network; the one at the end measures the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from lopt_edge.errors import InputError
from lopt_edge.plan.methods import method
from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.methods.method import Method, Problem, RunSettings
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment

TAIL_SHARE = 8  # of the depth is the tail, unless set otherwise: one part in so many


class Options(method.Options):
    """The options of segprop: how many stages, how deep a tail, and when a stage is over."""

    stages: int = Field(4, ge=1, description="segprop: stages, each with a segment of its own")
    tail_layers: int | None = Field(None, ge=1, description="segprop: final layers that train in all stages (default: 1/8)")
    stage_patience: int | None = Field(
        None, ge=1, description="segprop: a stage ends after N evaluations in a row without a lower held-out loss"
    )


def course(options: Options, n_layers: int) -> Course:
    """The course in stages, each before a tail. Raises InputError for more layers or stages than this depth has."""
    n_tail = options.tail_layers or max(1, n_layers // TAIL_SHARE)
    n_body = n_layers - n_tail
    if n_body < 1:
        raise InputError(
            f"{n_tail} leave no layer before them: the model has {n_layers}",
            where="tail_layers",
            fix=f"choose at most {n_layers - 1}",
        )
    if options.stages > n_body:
        raise InputError(
            f"{options.stages} are more than the {n_body} layers before the tail",
            where="stages",
            fix=f"choose at most {n_body}",
        )
    kinds = tuple(_stage(stage, n_body, n_layers, options.stages) for stage in range(options.stages))
    phases = tuple(Phase((i + 1) / len(kinds), (kind.name,)) for i, kind in enumerate(kinds))
    return Course("segprop", kinds, phases, restarts=True, patience=options.stage_patience)


def _stage(stage: int, n_body: int, n_layers: int, n_stages: int) -> StepKind:
    first, end = stage * n_body // n_stages, (stage + 1) * n_body // n_stages
    prefix = (Segment(0, 0, first - 1, "rest"),) if first else ()
    own = Segment(len(prefix), first, n_layers - 1, "task", absent=tuple(range(end, n_body)))
    return StepKind(f"stage-{stage + 1}", (*prefix, own))


def problems(options: Options, run: RunSettings) -> Iterator[Problem]:
    """The contradictions: what needs the whole model, dropout before a cached boundary, patience without evaluations."""
    if run.keep_best:
        what = "cannot be with segprop: its stages train other networks than the whole model"
        yield Problem("keep_best", what, "leave it out")
    if run.boundary_cache and run.lora_dropout and not run.init_adapter:  # beside one every method is refused
        what = "cannot be with lora_dropout where adapters lie before the boundary: dropout changes it each time"
        yield Problem("boundary_cache", what, "add --lora-dropout 0")
    if options.stage_patience and not (run.eval_every and (run.eval_data or run.eval_fraction)):
        what = "needs evaluations: eval_every, and eval_data or eval_fraction"
        yield Problem("stage_patience", what, "add --eval-every and --eval-fraction")


def pinned(options: Options) -> frozenset[str]:
    """The settings that a resumed run must keep: the number of steps decides where stages end; with patience so do the
    evaluations."""
    return frozenset({"max_steps", "epochs"} | ({"eval_every", "eval_data"} if options.stage_patience else set()))


METHODS = (
    Method(
        "segprop",
        Options,
        course,
        problems,
        caches=lambda _: True,
        pinned=pinned,
        learns="no reference",
        why_not="a stage is a network of fewer layers than the reference has",
    ),
)
