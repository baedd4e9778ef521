"""Granite 3: Llama's layers with factors on embeddings, logits and residuals (the last are transformers' module's own).
Where a layer has experts, checkpoints have them in two stacks."""

from __future__ import annotations

from lopt_edge.plan.facts.families.family import Experts, Family, attention, gated_mlp

_GRANITE = Family(
    "granite",
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")),
    embedding_factor="embedding_multiplier",
    logit_divisor="logits_scaling",
)
_STORED = "block_sparse_moe.experts.{}."
_GRANITE_MOE = Family(
    "granitemoe",
    defaults={
        "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "vocab_size": 32000, "max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    projections=attention(bias="attention_bias", out_bias="attention_bias"),
    embedding_factor="embedding_multiplier",
    logit_divisor="logits_scaling",
    experts=Experts(
        count=("num_local_experts",),
        inner=("intermediate_size",),
        module="block_sparse_moe",
        renames=(("block_sparse_moe.router.", "block_sparse_moe.router.layer."),),
        stored=(f"{_STORED}gate_proj", f"{_STORED}up_proj", f"{_STORED}down_proj"),
        stacks=(
            ("block_sparse_moe.input_linear.weight", 2),
            ("block_sparse_moe.output_linear.weight", 1),
            ("block_sparse_moe.experts.gate_up_proj", 2),
            ("block_sparse_moe.experts.down_proj", 1),
        ),
        publishes_stacks=True,
    ),
)  # fmt: skip

FAMILIES = (_GRANITE, _GRANITE_MOE)
