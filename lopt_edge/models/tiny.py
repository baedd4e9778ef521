"""A tiny random model of a config: the same kinds of layers in the same order, small sizes. What a proof runs on.

The rule: every choice of the config stays (activations, orders of norms, factors, biases, what is shared); only sizes
shrink, and of the layers as many are left, from the first on, as show each kind once. A config that names a size in a way
that nobody here knows keeps it, and where that no longer fits the others, transformers refuses to build the model.
"""

from __future__ import annotations

from typing import Any

HIDDEN, INNER, VOCABULARY, WINDOW, POSITIONS = 64, 128, 320, 8, 512
MOST_PARAMETERS = 20_000_000  # more is not tiny: a size that goes by another name was kept
HEADS, HEAD_DIM, WIDER_HEAD_DIM = 4, 16, 32
SIZES: dict[str, int] = {  # names of other sizes, as configs of transformers have them
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "block_ff_dim", "inner_dim"), INNER),
    **dict.fromkeys(("shared_intermediate_size", "expert_intermediate_size", "moe_intermediate_size"), HIDDEN),
    **dict.fromkeys(("shared_expert_intermediate_size",), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "q_lora_rank", "kv_lora_rank", "block_dim", "conv_dim", "lru_width"), HIDDEN),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"), HEAD_DIM),
    **dict.fromkeys(("mamba_d_ssm", "d_inner"), 2 * HIDDEN),
    "qk_head_dim": 2 * HEAD_DIM, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_chunk_size": 16, "sliding_window": WINDOW, "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
}  # fmt: skip
MOST = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
}


def smaller(config: Any, *, n_layers: int) -> Any:
    """The config with small sizes and its first `n_layers` layers. Raises what transformers raises for such a config."""
    names = getattr(config, "attribute_map", None) or {}
    known, n_before = config.to_dict(), config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    changes: dict[str, Any] = {}
    for name, value in known.items():
        if isinstance(value, list) and len(value) == n_before and n_before > 1:
            changes[name] = value[:n_layers]
        elif name.endswith("token_id"):
            changes[name] = _within_vocabulary(value)
        elif type(value) is int and name in SIZES:
            changes[name] = SIZES[name]
        elif type(value) is int and name in MOST:
            changes[name] = min(value, MOST[name])
        elif isinstance(value, dict):
            changes[name] = _short_lists(value)
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        changes[names.get(name, name)] = n_layers if name == "num_hidden_layers" else SIZES[name]
    if "num_key_value_heads" in known and known["num_key_value_heads"] is not None:
        changes["num_key_value_heads"] = HEADS if kv_heads == heads else 1 if kv_heads == 1 else HEADS // 2
    if known.get("head_dim"):
        plain = known["head_dim"] * heads == config.hidden_size
        changes["head_dim"] = HEAD_DIM if plain or "qk_rope_head_dim" in known else WIDER_HEAD_DIM
    left = {key: value for key, value in known.items() if key not in names.values() or key not in names}
    return type(config).from_dict({**left, **changes})


def _within_vocabulary(value: Any) -> Any:
    if isinstance(value, list):
        return [_within_vocabulary(one) for one in value]
    return min(value, VOCABULARY - 1) if type(value) is int and value >= 0 else value


def _short_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Factors for each frequency of a head (longrope), for as many as a small head has."""
    return {
        key: value[: HEAD_DIM // 2] if isinstance(value, list) and len(value) > HEAD_DIM // 2 else value
        for key, value in values.items()
    }


def random_model(config: Any, *, seed: int = 0) -> Any:
    """transformers' causal language model of a config, in fp32, with numbers so large that every part matters."""
    import torch
    from transformers import AutoModelForCausalLM

    classes: Any = AutoModelForCausalLM
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in classes.from_config(config).parameters())
    if n_parameters > MOST_PARAMETERS:
        raise ValueError(f"a small model of it has {n_parameters:,} parameters")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classes.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(drawn * 0.1)  # norms and biases that differ from their defaults
            else:
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
    return model
