"""EXAONE 4: norms behind attention and MLP, and in its mixed form windows with, full attention without rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_edge.plan.facts.families.family import FULL, SLIDING, Family


def _but_those_of_the_pattern(config: Mapping[str, Any], layer: int, window: int | None) -> str:
    return SLIDING if window is not None and (layer + 1) % config["sliding_window_pattern"] else FULL


_EXAONE4 = Family(
    "exaone4",
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
    asks=("layer_types",),
    layer_type=_but_those_of_the_pattern,
    qk_norm="head",
    post_norm=True,
)

FAMILIES = (_EXAONE4,)
