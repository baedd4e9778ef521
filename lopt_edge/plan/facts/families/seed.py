"""Seed-OSS: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, attention, gated_mlp

_SEED_OSS = Family(
    "seed_oss",
    defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    projections=(*attention(bias="attention_bias", out_bias="attention_out_bias"), *gated_mlp(bias="mlp_bias")),
)

FAMILIES = (_SEED_OSS,)
