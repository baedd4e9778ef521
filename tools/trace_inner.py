"""For trace_bytes.py: what is traced alone, as it runs many times inside one op: a delta rule's chunk, an expert's tile.

Both are computed, with real arithmetic on zeros, by the modules that run them in a step.
"""

from __future__ import annotations

import torch
from trace_step import DELTA_SIZES, Case, has_dense

from lopt_edge.plan.facts.families import family_of
from lopt_edge.plan.facts.families.family import LINEAR
from lopt_edge.run.model.delta_net import DeltaCore
from lopt_edge.tracing import tiles
from lopt_edge.tracing.step import Trace
from quant.experts import Expert
from quant.sizes import DELTA_CHUNK as CHUNK
from tools.tiny_models import tiny_config

DELTA_OPS = ("delta_forward", "delta_backward")


def traced_chunk(case: Case, sizes: dict[str, int]) -> Trace:
    """The trace of one whole chunk of a family's delta rule, and of its gradients."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(case.family, num_hidden_layers=1, layer_types=[LINEAR])
    config.linear_conv_kernel_dim = sizes["x"] - CHUNK + 1
    for name, letter in DELTA_SIZES:
        setattr(config, name, sizes[letter])
    layer = AutoModelForCausalLM._model_mapping[type(config)](config).to(case.dtype).eval().model.layers[0]
    net = next(module for module in layer.modules() if hasattr(module, "A_log")).requires_grad_(False)
    core, s = DeltaCore(net), sizes["s"]
    widths = sizes["c"], sizes["j"] * sizes["o"], sizes["j"], sizes["j"]
    tensors = tuple(torch.zeros(s, CHUNK, width, dtype=case.dtype) for width in widths)
    return tiles.traced_chunk(core, tensors, DELTA_OPS)


def traced_tile(case: Case, sizes: dict[str, int]) -> Trace:
    """The trace of one tile of a family's experts, and of its gradients."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(case.family, num_hidden_layers=1, **({"mlp_only_layers": []} if has_dense(case.family) else {}))
    layer = AutoModelForCausalLM._model_mapping[type(config)](config).eval().model.layers[0]
    gate = next(module for module in layer.modules() if hasattr(module, "_apply_gate"))._apply_gate
    (n, d, i), dtype = (sizes[letter] for letter in "ndi"), case.dtype
    record = family_of(case.family).experts
    sizes_of_biases = (2 * i, d) if record is not None and record.biases else ()
    biases = (torch.zeros(size, dtype=dtype) for size in sizes_of_biases)
    expert = Expert(torch.zeros(2 * i, d, dtype=dtype), torch.zeros(d, i, dtype=dtype), *biases)
    return tiles.traced_tile(gate, expert, n_rows=n, full_weights=record is not None and record.full_weights)
