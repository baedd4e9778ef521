"""Arcee (AFM): Llama's layers with an MLP of two matrices, and a squared ReLU between them."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, Projection, attention

_ARCEE = Family(
    "arcee",
    projections=(
        *attention(bias="attention_bias", out_bias="attention_bias"),
        Projection("mlp.up_proj", "hidden", "inner", "mlp_bias"),
        Projection("mlp.down_proj", "inner", "hidden", "mlp_bias"),
    ),
)

FAMILIES = (_ARCEE,)
