"""Tiny random models of every supported family, as real transformers folders. Used by the law tests; not a test itself.

Widths are multiples of 64: bitsandbytes 0.50.2's CPU kernel dequantises matrices with other row lengths wrongly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

BASE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
                  "mlp_only_layers": [2], "use_sliding_window": True, "sliding_window": 8},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 8},
    "qwen3_5_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                     "linear_value_head_dim": 32, "tie_word_embeddings": True},
    "qwen3_5_moe_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                         "linear_value_head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
                         "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "gemma2": {"sliding_window": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 32,
                    "sliding_window_pattern": 2},
    "gemma4_text": {"sliding_window": 8, "tie_word_embeddings": True, "hidden_size_per_layer_input": 0,
                    "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {},
    "glm4": {},
    "arcee": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "seed_oss": {"attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "ernie4_5": {"tie_word_embeddings": True},
    "hunyuan_v1_dense": {},
    "exaone4": {"sliding_window": 8},
    "ministral3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5,
                                       "original_max_position_embeddings": 8}},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
                "attention_multiplier": 0.2},
    "granitemoehybrid": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
                         "attention_multiplier": 0.2, "num_local_experts": 0, "shared_intermediate_size": 128,
                         "position_embedding_type": "rope"},
    "granitemoe": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "num_local_experts": 4,
                   "attention_multiplier": 0.2, "num_experts_per_tok": 2, "intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 8,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                    "truncate": False, "original_max_position_embeddings": 64, "rope_theta": 1.5e5}},
}  # fmt: skip
# Gemma 4's smaller form: layers are told of each token anew, the last three attend to keys of the third and the fourth.
GEMMA4_E = {"num_hidden_layers": 7, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 320,
            "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "attention_k_eq_v": False,
            "layer_types": [*["sliding_attention", "full_attention"] * 2, "sliding_attention", "sliding_attention",
                            "full_attention"]}  # fmt: skip
# Multimodal models: the text model inside, and a vision tower of next to nothing.
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14, "vision_use_head": False}  # fmt: skip
PIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
           "patch_size": 14, "head_dim": 16, "num_key_value_heads": 2}  # fmt: skip
GEMMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
         "num_key_value_heads": 2, "patch_size": 14, "position_embedding_size": 16}  # fmt: skip
QWEN = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
        "num_position_embeddings": 4}  # fmt: skip
QWEN_VL = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 14}
WRAPPERS: dict[str, tuple[str, dict, dict]] = {  # text family, vision config, own values
    "gemma3": ("gemma3_text", {"model_type": "siglip_vision_model", **SIGLIP}, {"mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {"model_type": "gemma4_vision", **GEMMA}, {"audio_config": None}),
    "qwen3_5": ("qwen3_5_text", {"model_type": "qwen3_5_vision", **QWEN}, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"model_type": "qwen3_5_moe_vision", **QWEN}, {}),
    "qwen2_vl": ("qwen2", {"model_type": "qwen2_vl_vision", **QWEN_VL, "hidden_size": 64, "embed_dim": 32}, {}),
    "qwen2_5_vl": ("qwen2", {"model_type": "qwen2_5_vl_vision", **QWEN_VL, "out_hidden_size": 64}, {}),
    "qwen3_vl": ("qwen3", {"model_type": "qwen3_vl_vision", **QWEN, "deepstack_visual_indexes": [1]}, {}),
    "mistral3": ("mistral", {"model_type": "pixtral", **PIXTRAL}, {"tie_word_embeddings": False}),
}
# What a text model says otherwise inside such a model: a type of its own, and three positions a token in its rotary tables.
INNER: dict[str, dict] = {
    "qwen2_vl": {"model_type": "qwen2_vl_text", "head_dim": None, "rope_parameters": {"mrope_section": [2, 3, 3]}},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text", "head_dim": None, "rope_parameters": {"mrope_section": [2, 3, 3]}},
    "qwen3_vl": {"model_type": "qwen3_vl_text", "rope_parameters": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
                 "use_sliding_window": None, "sliding_window": None, "layer_types": None, "max_window_layers": None},
}  # fmt: skip


def tiny_config(family: str, **changes: object) -> object:
    if family in WRAPPERS:
        text, vision, own = WRAPPERS[family]
        inner = tiny_config(text, **changes).to_dict()
        for key, value in INNER.get(family, {}).items():
            inner[key] = {**inner[key], **value} if isinstance(value, dict) else value
        inner = {key: value for key, value in inner.items() if value is not None}
        own = {"tie_word_embeddings": inner["tie_word_embeddings"], "image_token_index": 3, "image_token_id": 3, **own}
        return AutoConfig.for_model(family, text_config=inner, vision_config=vision, **own)
    values = {**BASE, **FAMILIES[family], **changes}
    if family == "granitemoehybrid":
        values["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
        values["shared_intermediate_size"] = values["intermediate_size"]
    if family == "qwen3_5_moe_text":  # which asks no intermediate_size
        values["intermediate_size"] = values["shared_expert_intermediate_size"]
    if family in ("phi3", "olmoe", "granitemoehybrid"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return AutoConfig.for_model(family, **values)


def make_folder(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes
) -> Path:
    """A saved model folder with random weights large enough that every part matters."""
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM
    model = kind.from_config(tiny_config(family, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases that differ from their defaults
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder
