"""MLAAN (arXiv 2406.16633): windows over two neighbouring segments, read out through a tail of later layers' averages.

Local learning is short-sighted: a segment that sees its own loss only forgets what later ones need. The paper mends that
twice, for image classifiers trained from scratch. Multilaminar local modules: beside its own (independent) loss a segment
gets that of the module after it, whose gradient runs over the boundary (cascaded). Leap augmented modules: between a
window's end and its classifier run a few layers copied from later in the network, always with the last one, fewer the
nearer the end; they carry an exponential moving average of those layers. The released code
(github.com/Wendy231015/MLAAN) weighs the two losses 0.001 and 0.999, moves averages with 0.995 to 0.999, gives the first
segment no loss of its own, and trains the last two together on the task.

Here, with segments 0 .. k-1, x_s the input of segment s, y_s = f_s(x_s), x_(s+1) = stop(y_s), the frozen norm and lm_head H
and w = `cascade_weight`:

    T_s = g_l1 .. g_lm, later layers: m = `leap_layers` evenly spaced in what follows segment s, the last one the depth's
          last (all of them where fewer follow; none for s = k-1); the base's 4-bit weights, adapters' averages E_l
    loss_s(x) = mean over supervised tokens of the cross-entropy of H(T_s(f_s(x)))

    L = sum over s > 0 of  (1 - w) loss_s(x_s) + w loss_s(f_(s-1)(x_(s-1)))          (for s = k-1 both are the task loss)
    after each step:  E_l <- a E_l + (1 - a) adapters of layer l,   a = `ema_momentum`,   at first E_l = the adapters

T_s passes the gradient exactly and gets none. A segment's gradients add up from two windows, (s-1, s) and (s, s+1).
One pass does both losses of a window: they have one value (the forward is the same), so segment s gets the gradient with
weight 1, and what crosses to segment s-1 is multiplied by w. A pass enters with the hidden states that the pass before held
(one more hidden state a micro-batch). Cost: all segments but the first and the last run forward and backward twice, and
every pass but the last runs m more layers: with n layers, about (2 - 2/k) n + (k - 2) m layer passes for e2e's n. Memory:
two segments' saved inputs and the tail's, instead of the whole depth's.

Where we deviate: no learned auxiliary parameters (the paper learns the copies, adds the average to the first of them alone
and trains classifiers; a LoRA run's later layers and head are there already, and good); the independent loss reads out
through the same tail, not straight into a classifier; all averages move (of the released code that for CIFAR alone moves
those of the last tail only); a = 0.99 by default (fine-tuning takes hundreds of steps, not hundred thousands); dropout is
off in the tail; the averages are kept in fp32 and stay out of the adapter folder. `clip_scope segment` clips a segment's
summed gradient.

Measured on the small example (8 layers, examples/study, lr 3e-3, one seed; held-out / retention loss): narrow 1.387 / 4.599
against e2e's 1.305 / 4.365 and frozen's 1.636 / 4.070; broad 4.106 / 3.636 against 4.083 / 3.598 and 4.109 / 3.594. So it
learns more than `frozen` where there is much to learn, never more than e2e, and forgets more than either. With two leap
layers narrow is 1.553 / 4.891 and broad 4.128 / 3.698, with one 1.729 / 5.287 and 4.149 / 3.787: the tail decides. From two
on narrow: `ema_momentum 0` (the later layers as they are) 1.470 / 4.782, so in runs this short the average only lags;
`cascade_weight 0.5` 1.564 / 4.951, `lr_local 1e-3` 1.667 / 4.604.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from lopt_edge.errors import InputError
from lopt_edge.plan.methods import method
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.methods.method import Method, Problem, RunSettings
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment, SegmentLoss, cut_depth

NUM_SEGMENTS = 4  # by default


class Options(method.Options):
    """The options of mlaan: how a window is read out, and how much of its loss reaches the segment before."""

    leap_layers: int = Field(4, ge=1, description="mlaan: later layers between a window and its loss, at most")
    ema_momentum: float = Field(0.99, ge=0, lt=1, description="mlaan: momentum of the averages of later layers' adapters")
    cascade_weight: float = Field(0.999, gt=0, le=1, description="mlaan: share of a loss that reaches the segment before")


def course(options: Options, n_layers: int) -> Course:
    """The course of segments in overlapping windows, one kind of step. Raises InputError for fewer than 3 segments."""
    cut = cut_depth(
        "next-token", n_layers=n_layers, num_segments=options.num_segments, boundary_layers=options.boundary_layers
    )
    if len(cut) < 3:
        where = "boundary_layers" if options.boundary_layers else "num_segments"
        raise InputError(
            f"mlaan needs 3 segments or more, not {len(cut)}: a window of two would be the whole depth",
            where=where,
            fix="use --method e2e, or more segments",
        )
    kinds = (StepKind("", tuple(_windowed(cut, segment, options.leap_layers) for segment in cut)),)
    return Course("mlaan", kinds, ema_momentum=options.ema_momentum, cascade_weight=options.cascade_weight)


def _windowed(cut: tuple[Segment, ...], segment: Segment, n_leaps: int) -> Segment:
    index, last = segment.index, cut[-1].last
    if index == 0:
        return Segment(0, segment.first, segment.last, "following")
    loss: SegmentLoss = "task" if segment is cut[-1] else "next-token"
    tail = leaps(segment.last + 1, last, n_leaps)
    return Segment(index, segment.first, segment.last, loss, reach=cut[index - 1].first, tail=tail)


def leaps(first: int, last: int, n_leaps: int) -> tuple[int, ...]:
    """The layers of a tail: at most so many of `first` .. `last`, evenly spaced and with the last one; none if there are
    none."""
    n_later = last - first + 1
    n_leaps = min(n_leaps, n_later)
    return tuple(first + (i + 1) * n_later // n_leaps - 1 for i in range(n_leaps))


def problems(_options: Options, run: RunSettings) -> Iterator[Problem]:
    """The contradictions: early updates, since a segment runs in two windows."""
    if run.apply != "step":
        what = "mlaan needs step: a segment that was updated would run again in the next window"
        yield Problem("apply", what, "leave apply out")


def warnings(_options: Options, run: RunSettings) -> Iterator[str]:
    """The weight of local losses, which is another method's and changes nothing here."""
    if "local_weight" in run.model_fields_set:
        yield "local_weight has no effect: cascade_weight weighs mlaan's losses"


METHODS = (
    Method(
        "mlaan",
        Options,
        course,
        problems,
        warnings,
        cuts=True,
        local=("lr_local", "local_weight"),
        defaults={"num_segments": NUM_SEGMENTS},
        learns="replies",
        why_not="its local losses learn to write every reply, the rejected ones, too",
    ),
)
