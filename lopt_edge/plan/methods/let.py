"""LET (arXiv 2602.05393): end to end, and early in the run an early layer learns to point where a teacher's last one does.

With h the output of layer `align_layer` (default: the third), T the teacher's last hidden state (after its final norm), and
step t of S_stop:

    L = task + w(t) * align;   align = - mean over tokens of cos(h, interp(T));   w(t) = 0.1 * (1 - (t - 1) / S_stop)

S_stop is `--align-until` of the run; after it a step is plain end to end. Widths are matched by linear interpolation of the
teacher's features. The paper pretrains large models beside a small pretrained teacher; here the teacher is the base model
without adapters unless `--teacher M` names another one with the same tokenizer.

`let-local` keeps LoPT's boundary: the early segment trains on `align` alone, at its end, the late one on the task. AdamW
does not see a loss' weight, so there the segment's learning rate falls linearly to 0 at S_stop instead; after that it has
no gradients at all (zero ones would let its momentum move it).

Our choices, where the paper leaves it open: which layer is aligned (the third), when it stops (half of the run), and that
the teacher's features are taken after its final norm. Where we deviate: padding is left out of the mean; prompt tokens are
in it. The teacher's features are computed once for each example before the training and kept on disk in bfloat16, since a
step then needs neither a second model nor a second pass.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from lopt_edge.errors import InputError
from lopt_edge.plan.methods import method
from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.methods.method import Method
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment, cut_depth

ALIGN, PLAIN = "align", "plain"  # kinds of step


class LocalOptions(method.Options):
    """The options of let-local: how long an early layer is aligned."""

    align_until: float = Field(0.5, gt=0, le=1, description="let: share of the run in which an early layer is aligned")


class Options(LocalOptions):
    """The options of let: how strongly and where an early layer is aligned beside the task."""

    align_weight: float = Field(0.1, gt=0, description="let: weight of the alignment at the first step")
    align_layer: int | None = Field(None, ge=0, description="let: whose output is aligned, from 0 (default: the third)")


def course(options: Options, n_layers: int) -> Course:
    """The course of the task with an alignment beside it. Raises InputError for a layer that this depth does not have."""
    align = min(2, n_layers - 1) if options.align_layer is None else options.align_layer
    if align >= n_layers:
        raise InputError(
            f"layer {align} is beyond the last one, {n_layers - 1}", where="align_layer", fix=f"choose 0 to {n_layers - 1}"
        )
    whole = (Segment(0, 0, n_layers - 1, "task"),)
    kinds = StepKind(ALIGN, whole, teacher=True, align=align), StepKind(PLAIN, whole)
    return replace(_until(options, "let", kinds), align_weight=options.align_weight)


def local_course(options: LocalOptions, n_layers: int) -> Course:
    """The course of early segments that are aligned, and a late one that learns the task. Raises InputError for a wrong
    cut."""
    segments = cut_depth(
        "align", n_layers=n_layers, num_segments=options.num_segments, boundary_layers=options.boundary_layers
    )
    resting = tuple(replace(segment, loss="rest") if segment.is_local else segment for segment in segments)
    kinds = StepKind(ALIGN, segments, teacher=any(s.is_local for s in segments)), StepKind(PLAIN, resting)
    return replace(_until(options, "let-local", kinds), local_fades=True)


def _until(options: LocalOptions, method: str, kinds: tuple[StepKind, StepKind]) -> Course:
    if options.align_until == 1.0:
        return Course(method, kinds[:1], (Phase(1.0, (ALIGN,)),))
    return Course(method, kinds, (Phase(options.align_until, (ALIGN,)), Phase(1.0, (PLAIN,))))


METHODS = (
    Method("let", Options, course, engine=("teacher",), phases_follow_steps=True),
    Method(
        "let-local",
        LocalOptions,
        local_course,
        engine=("teacher",),
        cuts=True,
        warnings=lambda _, run: method.weight_warnings(run),
        local=("lr_local", "local_weight"),
        phases_follow_steps=True,
    ),
)
