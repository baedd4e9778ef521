"""The model families that are supported, and all in which they differ.

The rule: nothing else in the package knows a `model_type`. What a config.json says is read by model.py through what is
written here.
"""

from __future__ import annotations

from typing import Any

# model_type -> what a config of that family may leave out (transformers' defaults), and its fused projections.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "gemma2": {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096},
    "phi3": {"fused": True},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "olmo2": {},
    "granite": {},
}
FAMILIES = tuple(_DEFAULTS)
# Which families' layers ask these keys; the others ignore them.
_ATTENTION_BIAS = ("llama", "qwen3", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite")
_MLP_BIAS = ("llama", "smollm3", "granite")
_USE_WINDOW = ("qwen2", "qwen3", "smollm3")  # use_sliding_window, false by default
_LAYER_TYPES = ("qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _slides(known: dict[str, Any], family: str, layer: int, window: int | None) -> bool:
    if family in ("mistral", "phi3"):
        return window is not None
    if family in ("qwen2", "qwen3"):
        return window is not None and bool(layer >= known.get("max_window_layers", 28))
    if family == "smollm3":
        rope = known.get("no_rope_layers")
        has_rope = (
            rope[layer]
            if isinstance(rope, list) and layer < len(rope)
            else (layer + 1) % known.get("no_rope_layer_interval", 4)
        )
        return window is not None and not has_rope
    pattern = {"gemma2": 2, "gemma3_text": known.get("sliding_window_pattern", 6)}.get(family, 1)
    return bool((layer + 1) % pattern)


EAGER_ONLY = (
    "gemma2",
)  # run.load: in transformers; here its attention runs in tiles of queries (run/model/query_tiles.py)
