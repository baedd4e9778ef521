"""GLM 4 (0414): half of a head is rotated, norms on both sides of attention and MLP, one matrix for the MLP's gate and its
other half."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, Projection, attention

_GLM4 = Family(
    "glm4",
    defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    projections=(
        *attention(bias="attention_bias"),
        Projection("mlp.gate_up_proj", "hidden", "inner+inner"),
        Projection("mlp.down_proj", "inner", "hidden"),
    ),
    rotary_share=0.5,
    norms=4,
    post_norm=True,
)

FAMILIES = (_GLM4,)
