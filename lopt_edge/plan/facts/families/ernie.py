"""ERNIE 4.5, its dense models: Llama's layers, and one key for all biases."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, attention, gated_mlp

_ERNIE4_5 = Family(
    "ernie4_5",
    defaults={"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
    projections=(*attention(bias="use_bias", out_bias="use_bias"), *gated_mlp(bias="use_bias")),
)

FAMILIES = (_ERNIE4_5,)
