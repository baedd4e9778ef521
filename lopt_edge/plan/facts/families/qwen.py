"""Qwen 2 (2.5 as well) and 3: a window, where it is in use, is that of the upper layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_edge.plan.facts.families.family import ALWAYS, FULL, SLIDING, Family, attention, gated_mlp

_ASKS = ("use_sliding_window", "layer_types")


def _upper_layers(config: Mapping[str, Any], layer: int, window: int | None) -> str:
    return SLIDING if window is not None and layer >= config["max_window_layers"] else FULL


_QWEN2 = Family(
    "qwen2",
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    asks=_ASKS,
    projections=(*attention(bias=ALWAYS), *gated_mlp()),
    layer_type=_upper_layers,
)
_QWEN3 = Family(
    "qwen3",
    defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    asks=_ASKS,
    projections=(*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp()),
    layer_type=_upper_layers,
    qk_norm="head",
)

FAMILIES = (_QWEN2, _QWEN3)
