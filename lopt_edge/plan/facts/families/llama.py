"""Llama, from which the others descend, and Mistral, whose layers all see a window; Ministral 3 scales its late queries.
Mixtral has experts in every layer, whose matrices its checkpoints call w1, w3 and w2."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Experts, Family, Wrapper, attention, gated_mlp, windowed

_LLAMA = Family(
    "llama",
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")),
)
_MISTRAL = Family("mistral", defaults={"num_key_value_heads": 8, "sliding_window": 4096}, layer_type=windowed)
_MINISTRAL3 = Family("ministral3", defaults={"num_key_value_heads": 8, "head_dim": 128}, layer_type=windowed)
_STORED = "block_sparse_moe.experts.{}."
_MIXTRAL = Family(
    "mixtral",
    defaults={
        "num_key_value_heads": 8, "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 131072, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    projections=attention(),
    layer_type=windowed,
    experts=Experts(
        count=("num_local_experts",),
        inner=("intermediate_size",),
        renames=(("mlp.", "block_sparse_moe."),),
        stored=(f"{_STORED}w1", f"{_STORED}w3", f"{_STORED}w2"),
        full_weights=True,
    ),
)  # fmt: skip

FAMILIES = (_MIXTRAL, _LLAMA, _MISTRAL, _MINISTRAL3)
WRAPPERS = (Wrapper("mistral3", text="mistral"),)  # Mistral Small 3.1 and 3.2; Ministral 3, whose inner config says so
