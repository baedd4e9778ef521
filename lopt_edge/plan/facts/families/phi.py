"""Phi 3 (3.5 and 4-mini as well): one matrix for queries, keys and values, one for the MLP's gate and its other half."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, Projection, windowed

_PHI3 = Family(
    "phi3",
    projections=(
        Projection("self_attn.qkv_proj", "hidden", "q+kv+kv"),
        Projection("self_attn.o_proj", "q", "hidden"),
        Projection("mlp.gate_up_proj", "hidden", "inner+inner"),
        Projection("mlp.down_proj", "inner", "hidden"),
    ),
    layer_type=windowed,
)

FAMILIES = (_PHI3,)
