"""End to end: the task gradient crosses the whole depth, in the exact form that takes the least memory.

MeBP (arXiv 2510.03425) and MeSP (arXiv 2602.13069) train LoRA on a phone: a layer's input is checkpointed, its forward is
run again in the backward, its 4-bit weights are decompressed lazily, and gradients of frozen weights are never formed. With
h_0 the embeddings, h_i = f_i(h_(i-1)) and L the task loss:

    g_n = dL / dh_n;   for i = n .. 1:   recompute f_i from h_(i-1);   dA_i, dB_i += (d f_i / d A_i, d f_i / d B_i)^T g_i;
                       g_(i-1) = (d f_i / d h_(i-1))^T g_i

One segment over all layers is just that: FORWARD keeps inputs, BACKWARD recomputes one layer and hands the gradient of its
input on. It is plain backpropagation, in another order of work: tests/laws/test_plain_autograd.py compares its gradients
with transformers + peft + autograd (law 2), tests/laws/test_single_graph.py with one graph of our own modules, bitwise (law
1, k = 1).

Where we deviate: MeSP writes the LoRA backward by hand to avoid saving x A; here the recomputed layer's graph holds it for
the time of one layer. The gated MLP's backward is by hand (quant/gated_mlp.py).
"""

from __future__ import annotations

from lopt_edge.plan.methods import frozen
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.methods.method import Method, Options
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment


def course(_options: Options, n_layers: int) -> Course:
    """The course of one segment; where it does not fit, the planner tries `frozen` halves."""
    smaller = frozen.course(Options(), n_layers) if n_layers > 1 else None
    return Course("e2e", (StepKind("", (Segment(0, 0, n_layers - 1, "task"),)),), smaller=smaller)


METHODS = (Method("e2e", Options, course),)
