"""Gemma 2, and the text parts of Gemma 3 (multimodal from 4B on) and Gemma 4: norms on both sides of attention and MLP, and
windows in most layers. Gemma 4's other layers have wider heads, of whose keys the larger models make their values; in the
smaller ones each layer is told of a token anew, and the upper layers attend to keys and values of lower ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lopt_edge.plan.facts.families.family import (
    FULL,
    ROOT_OF_HIDDEN,
    SLIDING,
    TINY,
    Family,
    Projection,
    Wrapper,
    attention,
    gated_mlp,
)

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
    plain_norms=False,
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
    plain_norms=False,
    qk_norm="head",
    post_norm=True,
)


def _but_every_sixth_and_the_last(config: Mapping[str, Any], layer: int, _window: int | None) -> str:
    return SLIDING if (layer + 1) % 6 and layer + 1 < config["num_hidden_layers"] else FULL


def _wider_heads(config: Mapping[str, Any], layer: int, layer_type: str) -> Mapping[str, Any]:
    """As hubs have it (`global_head_dim`), or as transformers 5 saves it again (`per_layer_config`)."""
    by_layer = config.get("per_layer_config")
    if by_layer is not None:
        own = by_layer.get(str(layer), {}) if isinstance(by_layer, dict) else None
        return own if isinstance(own, dict) else {"per_layer_config": by_layer}
    if layer_type != FULL:
        return {}
    n_kv_heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    return {"head_dim": config["global_head_dim"], **({"num_key_value_heads": n_kv_heads} if n_kv_heads else {})}


_A = "attention_bias"
_OWN = "hidden_size_per_layer_input"
_MLP = (
    *gated_mlp(),
    Projection("per_layer_input_gate", "hidden", "own input", only=_OWN),
    Projection("per_layer_projection", "own input", "hidden", only=_OWN),
)
_GEMMA4_TEXT = replace(
    _GEMMA3_TEXT,
    name="gemma4_text",
    defaults={
        **_DEFAULTS, "vocab_size": 262144, "num_attention_heads": 8, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 30, "max_position_embeddings": 131072, "sliding_window": 512, "global_head_dim": 512,
        _OWN: 256, "vocab_size_per_layer_input": 262144,
    },
    shown={
        **TINY, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 8, _OWN: 0, "attention_k_eq_v": True,
        "global_head_dim": 64, "num_global_key_value_heads": 1, "tie_word_embeddings": True,
    },
    projections=(*attention(bias=_A, out_bias=_A), *_MLP),
    projections_by_type={
        FULL: (
            *attention(bias=_A)[:2],
            Projection("self_attn.v_proj", "hidden", "kv", _A, unless="attention_k_eq_v"),
            *attention(out_bias=_A)[3:],
            *_MLP,
        )
    },
    layer_type=_but_every_sixth_and_the_last,
    overrides=_wider_heads,
    refuses={"enable_moe_block": "a mixture of experts, as in 26B-A4B, is"},
    own_inputs=_OWN,
    own_vocabulary="vocab_size_per_layer_input",
    shared_keys="num_kv_shared_layers",
    wider="use_double_wide_mlp",
    scalars=1,
)  # fmt: skip

FAMILIES = (_GEMMA2, _GEMMA3_TEXT, _GEMMA4_TEXT)
WRAPPERS = (Wrapper("gemma3", text="gemma3_text"), Wrapper("gemma4", text="gemma4_text"))
