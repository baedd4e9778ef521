"""Granite 3 and 4: Llama's layers with factors on embeddings, logits and residuals (the last are its module's own).
Where a layer has experts, checkpoints have them in two stacks. Of Granite 4 those models are here whose layers all have
attention and no experts (micro, 1b, 350m): their MLP is what the others call shared. Those with mamba layers or experts run
as a family without a record does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_edge.plan.facts.families.family import FULL, LINEAR, TINY, Experts, Family, Projection, attention, gated_mlp

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


def _attention_or_mamba(config: Mapping[str, Any], layer: int, _window: int | None) -> str:
    """Which one hubs say with words of their own; mamba where the config says nothing, as in transformers."""
    given = config.get("layer_types") or config.get("layers_block_type")
    named = given[layer] if isinstance(given, list) and layer < len(given) else ""
    return FULL if named in ("attention", FULL) else LINEAR


def _has_more(config: Mapping[str, Any]) -> bool:
    given = config.get("layer_types") or config.get("layers_block_type")
    types = {str(one) for one in given} if isinstance(given, list) else {"mamba"}
    return bool(config.get("num_local_experts", 8)) or not types <= {"attention", FULL}


_GRANITE4 = Family(
    "granitemoehybrid",
    defaults={
        "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "vocab_size": 32000, "max_position_embeddings": 2048, "num_local_experts": 8, "shared_intermediate_size": 1024,
    },
    projections=(
        *attention(bias="attention_bias", out_bias="attention_bias"),
        Projection("shared_mlp.input_linear", "hidden", "inner+inner"),
        Projection("shared_mlp.output_linear", "inner", "hidden"),
    ),
    inner="shared_intermediate_size",
    layer_type=_attention_or_mamba,
    refuses={"num_local_experts": "experts beside an MLP, as in Granite 4 tiny and small, are"},
    requires={"position_embedding_type": "rope"},
    beyond=_has_more,
    shown={
        **TINY, "num_local_experts": 0, "shared_intermediate_size": 128, "position_embedding_type": "rope", "head_dim": 16,
        "layer_types": [FULL] * TINY["num_hidden_layers"],
    },
    embedding_factor="embedding_multiplier",
    logit_divisor="logits_scaling",
)  # fmt: skip

FAMILIES = (_GRANITE, _GRANITE_MOE, _GRANITE4)
