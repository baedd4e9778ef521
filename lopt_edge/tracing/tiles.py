"""What runs many times inside one op, traced alone on zeros: a tile of an expert's tokens (quant/experts.py), a chunk of a
recurrence (run/model/chunks.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt_edge.run.model.chunks import ChunkCore, chunk_gradient, run_chunk
from lopt_edge.tracing.log import EventLog
from lopt_edge.tracing.step import Trace
from quant.experts import Expert, ExpertGradients, Gate, backward_tile, forward_tile
from quant.sizes import DELTA_CHUNK as CHUNK

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


def traced_chunk(core: ChunkCore, tensors: tuple[Tensor, ...], ops: tuple[str, str]) -> Trace:
    """The trace of one whole chunk of a recurrence with these inputs, and of its gradients; its two ops by name."""
    n_sequences, log = len(tensors[0]), EventLog()
    values = tensors[0].new_zeros(n_sequences, CHUNK, core.width)
    found = [torch.zeros_like(tensor) for tensor in tensors]
    states = [core.first_state(n_sequences, torch.device("cpu")) for _ in range(2)]
    own = core.state_dict(keep_vars=True).values() if isinstance(core, torch.nn.Module) else ()
    trace = Trace(given={name: {} for name in ops}, result=dict.fromkeys(ops, -1))
    with log:
        log.watch([*tensors, *found, values, *states, *own])
        for name in ops:
            log.events.clear()
            if name == ops[0]:
                run_chunk(core, tensors, 0, states[0], values)
            else:
                chunk_gradient(core, tensors, 0, states[0], (values, states[1]), found)
            trace.spans[name] = list(log.events)
    return trace
