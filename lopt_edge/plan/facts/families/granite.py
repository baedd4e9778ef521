"""Granite 3: Llama's layers with factors on embeddings, logits and residuals (the last are transformers' module's own)."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, attention, gated_mlp

_GRANITE = Family(
    "granite",
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")),
    embedding_factor="embedding_multiplier",
    logit_divisor="logits_scaling",
)

FAMILIES = (_GRANITE,)
