"""RepL: some layers of the middle have no weights of their own; theirs are made from the layers beside them.

Replacement Learning (arXiv 2410.01239; longer form arXiv 2605.19533) trains vision networks in which every few blocks one
is taken out. In its place stands a light computing layer: it builds an operator from the parameters of the block before
and the block after by a learned fusion and applies that to the preceding activation. In the first paper the fusion is two
learned numbers a block; the second adapts it to convolutions and to the submodules of a ViT. What we take: replacing
instead of skipping, both neighbours as the source, two learned numbers. (Read: the abstracts and what summaries quote.)

For a replaced layer i and each linear module m of it, from the frozen 4-bit weights W of the layers beside it:

    W'_(i,m) = a_(i,m) W_(i-1,m) + b_(i,m) W_(i+1,m)  (+ s (A B)^T, the layer's LoRA adapter: the low-rank residual)
    [a, b] at the start = argmin |W_(i,m) - a W_(i-1,m) - b W_(i+1,m)|_F,  from the dequantised weights
    da = <dL/dW', W_(i-1,m)>,   db = <dL/dW', W_(i+1,m)>          (quant/mixed.py, block by block)

All layers train end to end, as in `e2e`; a and b train in their layer's group, at its learning rate. Norms and biases of
layer i are kept; its packed weights are neither held nor saved. `--replace-layers 3,5` names the layers; else it is every
third one of the middle half. The first and the last layer, and two adjacent ones, cannot be replaced.

Where we deviate: the papers train from scratch and the neighbours too, so a replaced block can grow with them; here the
neighbours are frozen and the layer had learned something that is lost. So least squares at the start, coefficients for
each module, and the adapter as a residual. What that is worth must be measured, and each run does: the intact model's
held-out loss, the jump, and what training closed of it. In pretrained models the weights of neighbours are all but
uncorrelated, and the best a and b are near 0: the replaced layer starts out as nearly no layer. On examples/tiny-llama
(layers 2 and 5 of 8) least squares leaves 96% to 100% of each matrix' norm unexplained. Held-out loss there, seed 0:
examples/study/broad.yaml intact 4.803, replaced 4.992, trained 4.164 (e2e 4.083); narrow.yaml 7.199, 6.990, 1.389 (e2e
1.305), where the untrained model knows so little that losing two layers did no harm. Retention loss is worse by 0.25
(broad) and 0.12 (narrow) than e2e's. So it is a way to save 4-bit bytes at a price, no gain.

Resident weights only: a streamed replaced layer would need both neighbours in buffers at once, and saves no bytes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from pydantic import Field

from lopt_edge.errors import InputError
from lopt_edge.plan.methods import method
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.methods.method import Method, Problem, RunSettings
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment

EVERY = 3


class Options(method.Options):
    """The options of repl: which layers are replaced."""

    replace_layers: tuple[int, ...] | None = Field(
        None, description="repl: e.g. 3,5: layers made from those beside them (default: every third of the middle half)"
    )


def course(options: Options, n_layers: int) -> Course:
    """The course of one segment in which some layers are replaced. Raises InputError for layers that cannot be."""
    replaced = _chosen(n_layers) if options.replace_layers is None else _checked(options.replace_layers, n_layers)
    return Course("repl", (StepKind("", (Segment(0, 0, n_layers - 1, "task", replaced=replaced),)),))


def _chosen(n_layers: int) -> tuple[int, ...]:
    """The layers that are replaced by default: every third of the middle half."""
    if n_layers < 3:
        raise InputError(
            f"repl needs a model of at least 3 layers, this one has {n_layers}", where="method", fix="use another method"
        )
    return tuple(range(max(1, n_layers // 4), min(n_layers - 1, n_layers - n_layers // 4), EVERY))


def _checked(layers: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    found = sorted(set(layers))
    fix = f"choose layers from 1 to {n_layers - 2}, no two of them adjacent" if n_layers > 2 else "use another method"
    if not all(0 < layer < n_layers - 1 for layer in found):
        what = f"a replaced layer has one on both sides: {', '.join(map(str, found))} of layers 0 to {n_layers - 1}"
        raise InputError(what, where="replace_layers", fix=fix)
    if any(right - left == 1 for left, right in pairwise(found)):
        raise InputError(
            f"{', '.join(map(str, found))}: adjacent layers cannot be made from each other", where="replace_layers", fix=fix
        )
    return tuple(found)


def problems(_options: Options, run: RunSettings) -> Iterator[Problem]:
    """The contradictions: streamed weights, and adapters of the intact model."""
    if "disk" in run.weights or "host" in run.weights:
        what = "must be resident with method repl: a replaced layer reads both layers beside it"
        yield Problem("weights", what, "leave weights out, or use another method")
    if run.init_adapter:
        what = "cannot be with method repl: adapters of the intact model do not fit the replaced layers"
        fix = "leave it out, or merge it first (lopt-edge export) and train the merged model"
        yield Problem("init_adapter", what, fix)


METHODS = (
    Method(
        "repl",
        Options,
        course,
        problems,
        resident=True,
        learns="no reference",
        why_not="its base has layers replaced, so it is no reference",
    ),
)
