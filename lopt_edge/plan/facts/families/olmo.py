"""OLMo 2 and 3: norms behind attention and MLP instead of before them, and over the whole of queries and keys. OLMoE has
experts in every layer, and its norms before attention and experts."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Experts, Family, attention, but_every_fourth, gated_mlp

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
_OLMOE = Family(
    "olmoe",
    defaults={
        "num_attention_heads": 16, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "vocab_size": 50304, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8,
    },
    projections=attention(bias="attention_bias", out_bias="attention_bias"),
    qk_norm="projection",
    refuses={"clip_qkv": "clipped queries, keys and values are"},
    experts=Experts(count=("num_experts",), inner=("intermediate_size",)),
)  # fmt: skip

FAMILIES = (_OLMO2, _OLMO3, _OLMOE)
