"""OLMo 2 and 3: norms behind attention and MLP instead of before them, and over the whole of queries and keys."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, attention, but_every_fourth, gated_mlp

_OLMO2 = Family(
    "olmo2",
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp()),
    qk_norm="projection",
    post_norm=True,
)
_OLMO3 = Family(
    "olmo3",
    defaults={"sliding_window": 4096},
    asks=("layer_types",),
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp()),
    layer_type=but_every_fourth,
    rotary_by_type=True,
    qk_norm="projection",
    post_norm=True,
)

FAMILIES = (_OLMO2, _OLMO3)
