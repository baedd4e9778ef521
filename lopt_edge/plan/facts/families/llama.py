"""Llama, from which the others descend, and Mistral, whose layers all see a window; Ministral 3 scales its late queries."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Family, Wrapper, attention, gated_mlp, windowed

_LLAMA = Family(
    "llama",
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")),
)
_MISTRAL = Family("mistral", defaults={"num_key_value_heads": 8, "sliding_window": 4096}, layer_type=windowed)
_MINISTRAL3 = Family("ministral3", defaults={"num_key_value_heads": 8, "head_dim": 128}, layer_type=windowed)

FAMILIES = (_LLAMA, _MISTRAL, _MINISTRAL3)
WRAPPERS = (Wrapper("mistral3", text="mistral"),)  # Mistral Small 3.1 and 3.2; Ministral 3, whose inner config says so
