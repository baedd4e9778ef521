"""Qwen 2 (2.5 as well) and 3: a window, where it is in use, is that of the upper layers alone; with experts (Qwen 3 MoE)
that of all layers. Qwen 3.5: gated attention in every fourth layer, and a gated delta rule in the others; it is published
with a vision tower around it, as VL models are. With experts (35B-A3B) each layer has one more that all tokens go to, and a
gate for it.

The text model inside a VL model is that of its time: its rotary tables have three positions a token (time, height, width),
which are equal for text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lopt_edge.plan.facts.families.family import (
    ALWAYS,
    FULL,
    LINEAR,
    SLIDING,
    Experts,
    Family,
    Projection,
    Wrapper,
    attention,
    gated_mlp,
    windowed,
)

_ASKS = ("use_sliding_window", "layer_types")


def _upper_layers(config: Mapping[str, Any], layer: int, window: int | None) -> str:
    return SLIDING if window is not None and layer >= config["max_window_layers"] else FULL


def _but_every_fourth(config: Mapping[str, Any], layer: int, _window: int | None) -> str:
    return LINEAR if (layer + 1) % config["full_attention_interval"] else FULL


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


def _sparse(config: Mapping[str, Any], layer: int) -> bool:
    return layer not in config["mlp_only_layers"] and (layer + 1) % config["decoder_sparse_step"] == 0


_BIAS = "attention_bias"
_QWEN3_MOE = Family(
    "qwen3_moe",
    defaults={
        "num_key_value_heads": 4, "num_attention_heads": 32, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 24, "vocab_size": 151936, "max_position_embeddings": 32768, "sliding_window": 4096,
        "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    asks=("use_sliding_window",),
    projections=(*attention(bias=_BIAS, out_bias=_BIAS), *gated_mlp()),
    layer_type=windowed,
    qk_norm="head",
    experts=Experts(lies_in=_sparse),
)  # fmt: skip
_QWEN3_5 = Family(
    "qwen3_5_text",
    defaults={
        "num_key_value_heads": 4, "num_attention_heads": 16, "head_dim": 256, "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 12288, "vocab_size": 248320, "max_position_embeddings": 32768, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    asks=("layer_types",),
    projections=(
        Projection("self_attn.q_proj", "hidden", "q+q", _BIAS),  # queries, and a gate for each output
        *attention(bias=_BIAS, out_bias=_BIAS)[1:],
        *gated_mlp(),
    ),
    projections_by_type={
        LINEAR: (
            Projection("linear_attn.in_proj_qkv", "hidden", "conv"),
            Projection("linear_attn.in_proj_z", "hidden", "value"),
            Projection("linear_attn.in_proj_b", "hidden", "value heads"),
            Projection("linear_attn.in_proj_a", "hidden", "value heads"),
            Projection("linear_attn.out_proj", "value", "hidden"),
            *gated_mlp(),
        )
    },
    layer_type=_but_every_fourth,
    rotary_share=0.25,
    qk_norm="head",
    plain_norms=False,
)  # fmt: skip
_SHARED = (
    Projection("mlp.shared_expert.gate_proj", "hidden", "inner"),
    Projection("mlp.shared_expert.up_proj", "hidden", "inner"),
    Projection("mlp.shared_expert.down_proj", "inner", "hidden"),
    Projection("mlp.shared_expert_gate", "hidden", "one"),
)
_QWEN3_5_MOE = replace(
    _QWEN3_5,
    name="qwen3_5_moe_text",
    defaults={
        **_QWEN3_5.defaults, "num_key_value_heads": 2, "hidden_size": 2048, "num_hidden_layers": 40, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
    projections=(*_QWEN3_5.projections[:4], *_SHARED),
    projections_by_type={LINEAR: (*_QWEN3_5.projections_by_type[LINEAR][:5], *_SHARED)},
    inner="shared_expert_intermediate_size",
    experts=Experts(count=("num_experts",), beside="mlp.shared_expert", takes_names=False),
)  # fmt: skip

FAMILIES = (_QWEN2, _QWEN3, _QWEN3_MOE, _QWEN3_5, _QWEN3_5_MOE)
# Hubs have Qwen2-VL's and 2.5-VL's text as if it stood alone, its config flat and its names under "model.".
_FLAT = (("model.language_model.", "lm_head.weight"), ("model.", "lm_head.weight"))
WRAPPERS = (
    Wrapper("qwen2_vl", text="qwen2", inner=("qwen2_vl_text",), is_flat=True, ties=False, prefixes=_FLAT),
    Wrapper("qwen2_5_vl", text="qwen2", inner=("qwen2_5_vl_text",), is_flat=True, ties=False, prefixes=_FLAT),
    Wrapper("qwen3_vl", text="qwen3", inner=("qwen3_vl_text",), ties=False),
    Wrapper("qwen3_5", text="qwen3_5_text", ties=False),
    Wrapper("qwen3_5_moe", text="qwen3_5_moe_text", ties=False),
)
