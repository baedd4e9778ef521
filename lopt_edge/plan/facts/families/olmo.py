"""OLMo 2: norms behind attention and MLP instead of before them, and over the whole of queries and keys."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, attention, gated_mlp

_OLMO2 = Family(
    "olmo2",
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp()),
    qk_norm="projection",
    post_norm=True,
)

FAMILIES = (_OLMO2,)
