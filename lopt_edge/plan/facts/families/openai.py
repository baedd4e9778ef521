"""gpt-oss: attention with biases, a sink for each head, and a window in every other layer; experts everywhere.

An expert's two products have biases, and between them stands a gated unit of its own, whose gate and value lie in turn
(row 0 the gate's, row 1 the value's, ...); transformers' module computes it. Checkpoints have the experts in MXFP4, all of
a layer in one tensor of blocks and one of scales; a full-precision one has them in stacks, columns before rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_edge.plan.facts.families.family import FULL, SLIDING, Experts, Family, attention


def _every_other(_config: Mapping[str, Any], layer: int, _window: int | None) -> str:
    return FULL if layer % 2 else SLIDING


_GPT_OSS = Family(
    "gpt_oss",
    defaults={
        "num_key_value_heads": 8, "num_attention_heads": 64, "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "vocab_size": 201088, "max_position_embeddings": 131072, "sliding_window": 128,
        "num_local_experts": 128, "num_experts_per_tok": 4, "attention_bias": True,
    },
    asks=("layer_types",),
    projections=attention(bias="attention_bias", out_bias="attention_bias"),
    layer_type=_every_other,
    experts=Experts(
        count=("num_local_experts", "num_experts"),
        inner=("intermediate_size",),
        stored=("mlp.experts.{}.gate_up_proj", "mlp.experts.{}.down_proj"),
        stacks=(("mlp.experts.gate_up_proj", 1), ("mlp.experts.down_proj", 1)),
        publishes_stacks=True,
        transposed=True,
        biases=("gate_up_proj_bias", "down_proj_bias"),
        router_bias=True,
        in_mxfp4=True,
    ),
    attention="query tiles",
    sinks=True,
)  # fmt: skip

FAMILIES = (_GPT_OSS,)
