"""SmolLM 3: some layers rotate nothing, and a window, where it is in use, is theirs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_edge.plan.facts.families.family import FULL, SLIDING, Family, attention, gated_mlp


def _without_rotation(config: Mapping[str, Any], layer: int, window: int | None) -> str:
    rope = config.get("no_rope_layers")  # 1 for each layer that rotates
    given = isinstance(rope, list) and layer < len(rope)
    rotates = config["no_rope_layers"][layer] if given else (layer + 1) % config["no_rope_layer_interval"]
    return FULL if window is None or rotates else SLIDING


_SMOLLM3 = Family(
    "smollm3",
    defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    asks=("use_sliding_window", "layer_types"),
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp(bias="mlp_bias")),
    layer_type=_without_rotation,
)

FAMILIES = (_SMOLLM3,)
