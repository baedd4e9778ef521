"""Gemma 2, and the text part of Gemma 3 (multimodal from 4B on): norms on both sides of attention and MLP, and windows in
most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_edge.plan.facts.families.family import FULL, ROOT_OF_HIDDEN, SLIDING, Family, Wrapper, attention, gated_mlp

_DEFAULTS = {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096}
# Gemma 3's published multimodal configs leave out most of what is so.
_DEFAULTS3 = {**_DEFAULTS, "sliding_window_pattern": 6, "vocab_size": 262208, "num_attention_heads": 8,
              "max_position_embeddings": 131072}  # fmt: skip
_PROJECTIONS = (*attention(bias="attention_bias", out_bias="attention_bias"), *gated_mlp())


def _but_every_second(_config: Mapping[str, Any], layer: int, _window: int | None) -> str:
    return SLIDING if (layer + 1) % 2 else FULL


def _but_those_of_the_pattern(config: Mapping[str, Any], layer: int, _window: int | None) -> str:
    return SLIDING if (layer + 1) % config["sliding_window_pattern"] else FULL


_GEMMA2 = Family(
    "gemma2",
    defaults=_DEFAULTS,
    asks=("layer_types",),
    projections=_PROJECTIONS,
    layer_type=_but_every_second,
    embedding_factor=ROOT_OF_HIDDEN,
    logit_cap="final_logit_softcapping",
    attention="query tiles",
    norms=4,
    post_norm=True,
)
_GEMMA3_TEXT = Family(
    "gemma3_text",
    defaults=_DEFAULTS3,
    asks=("layer_types",),
    projections=_PROJECTIONS,
    layer_type=_but_those_of_the_pattern,
    embedding_factor=ROOT_OF_HIDDEN,
    logit_cap="final_logit_softcapping",
    rotary_by_type=True,
    norms=4,
    qk_norm="head",
    post_norm=True,
)

FAMILIES = (_GEMMA2, _GEMMA3_TEXT)
WRAPPERS = (Wrapper("gemma3", text="gemma3_text"),)
