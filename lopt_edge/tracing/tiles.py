"""A tile of an expert's tokens, traced alone: it runs many times inside one op (quant/experts.py), on zeros."""

from __future__ import annotations

import torch

from lopt_edge.tracing.log import EventLog
from lopt_edge.tracing.step import Trace
from quant.experts import Expert, ExpertGradients, Gate, backward_tile, forward_tile

EXPERT_OPS = ("experts_forward", "experts_backward")


def traced_tile(gate: Gate, expert: Expert, *, n_rows: int, full_weights: bool) -> Trace:
    """The trace of one tile of `n_rows` tokens, and of its gradients."""
    dtype, hidden, log = expert.down.dtype, len(expert.down), EventLog()
    x, g, y = (torch.zeros(2 * n_rows, hidden, dtype=dtype) for _ in range(3))
    weights, places = torch.zeros(2 * n_rows, 3, dtype=torch.float32 if full_weights else dtype), torch.arange(n_rows)
    sums = ExpertGradients(torch.zeros(2 * n_rows, hidden), torch.zeros_like(weights))
    trace = Trace(given={name: {} for name in EXPERT_OPS}, result=dict.fromkeys(EXPERT_OPS, -1))
    with log:
        given = [tensor for tensor in expert if tensor is not None]
        log.watch([*given, x, g, y, weights, places, sums.dx_ND, sums.d_weights_NP])
        for name in EXPERT_OPS:
            log.events.clear()
            if name == "experts_forward":
                with torch.no_grad():
                    forward_tile(gate, expert, (x, weights), places, y_ND=y)
            else:
                backward_tile(gate, expert, (x, weights, g), places, sums=sums)
            trace.spans[name] = list(log.events)
    return trace
