"""Hunyuan's dense models: a norm over each head of queries and keys, after their rotation."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, attention, gated_mlp

_HUNYUAN_V1_DENSE = Family(
    "hunyuan_v1_dense",
    defaults={"num_key_value_heads": 32},
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp()),
    qk_norm="head",
    shown={"head_dim": 128},
)

FAMILIES = (_HUNYUAN_V1_DENSE,)
