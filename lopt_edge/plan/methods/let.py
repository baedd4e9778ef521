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

Where we deviate: padding is left out of the mean; prompt tokens are in it. The teacher's features are computed once for
each example before the training and kept on disk in bfloat16, since a step then needs neither a second model nor a second
pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lopt_edge.errors import InputError
from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment, cut_depth

if TYPE_CHECKING:
    from lopt_edge.config.settings import Config

ALIGN, PLAIN = "align", "plain"  # kinds of step


def course(config: Config, n_layers: int) -> Course:
    align = min(2, n_layers - 1) if config.align_layer is None else config.align_layer
    if align >= n_layers:
        raise InputError(
            f"layer {align} is beyond the last one, {n_layers - 1}", where="align_layer", fix=f"choose 0 to {n_layers - 1}"
        )
    whole = (Segment(0, 0, n_layers - 1, "task"),)
    kinds = StepKind(ALIGN, whole, teacher=True, align=align), StepKind(PLAIN, whole)
    return _until(config, "let", kinds)


def local_course(config: Config, n_layers: int) -> Course:
    segments = cut_depth(
        "align", n_layers=n_layers, num_segments=config.num_segments, boundary_layers=config.boundary_layers
    )
    resting = tuple(replace(segment, loss="rest") if segment.is_local else segment for segment in segments)
    return _until(
        config,
        "let-local",
        (StepKind(ALIGN, segments, teacher=any(s.is_local for s in segments)), StepKind(PLAIN, resting)),
    )


def _until(config: Config, method: str, kinds: tuple[StepKind, StepKind]) -> Course:
    if config.align_until == 1.0:
        return Course(method, kinds[:1], (Phase(1.0, (ALIGN,)),))
    return Course(method, kinds, (Phase(config.align_until, (ALIGN,)), Phase(1.0, (PLAIN,))))
