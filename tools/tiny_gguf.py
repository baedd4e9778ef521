"""Writes a transformers folder as a GGUF file with the `gguf` package, in any block type, for tests. Not a test itself.

It follows llama.cpp's converter (names by gguf's own `TensorNameMap`, q and k permuted for the architectures whose rotation
wants it, 1 added to Gemma's norms) and shares no code with ours. Types for which the package has no quantiser get blocks of
random codes with scales of a fitting size, so the model in such a file is another one: `weights_of` says which.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from gguf.constants import GGML_QUANT_SIZES
from safetensors.torch import load_file

ARCHITECTURES = {"gemma3_text": "gemma3", "gpt_oss": "gpt-oss"}
EXPERTS = "MXFP4"
PAIRS = ("llama", "smollm3", "granite")
# where the half-precision scales of a block lie, and the largest code times sub-scale that they multiply, roughly
SCALES = {
    "Q2_K": ((80, 82), 20), "Q3_K": ((108,), 60), "Q4_K": ((0, 2), 400), "Q5_K": ((0, 2), 800), "Q6_K": ((208,), 1500),
    "IQ4_NL": ((0,), 70), "IQ4_XS": ((0,), 1500),
}  # fmt: skip
EXTRA = {  # keys of an architecture beside the common ones: the config's names for them
    "granite": {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"},
    "gemma2": {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
}  # fmt: skip


def write_gguf(
    source: Path,
    target: Path,
    kinds: tuple[str, ...] = ("Q8_0",),
    *,
    embedding: str = "F16",
    vocabulary: bool = False,
    metadata: dict | None = None,
    frequencies: list[float] | None = None,
) -> Path:
    """Write the model of a folder; matrices of the layers get the kinds in turn, norms and biases stay in fp32.

    `vocabulary`: with the folder's tokenizer and template. `metadata` replaces or adds keys, also by wrong ones;
    `frequencies` is Llama 3's table.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    name = ARCHITECTURES.get(family, family)
    arch = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    writer = gguf.GGUFWriter(target, name)
    _metadata(writer, config, name)
    if vocabulary:
        _vocabulary(writer, source)
    for key, value in (metadata or {}).items():
        del_key(writer, key)
        kind = {str: Value.STRING, int: Value.UINT32, float: Value.FLOAT32}[type(value)]
        writer.add_key_value(key, value, kind)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", np.array(frequencies, dtype=np.float32))
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    random, turn = np.random.default_rng(0), 0
    tensors = load_file(source / "model.safetensors")
    for key, tensor in _of_experts(tensors):
        theirs = names.get_name(key, try_suffixes=(".weight", ".bias"))
        values = tensor.float().numpy()
        kind = Kind[EXPERTS] if values.ndim == 3 else None
        writer.add_tensor(theirs, values if kind is None else gguf.quantize(values, kind), raw_dtype=kind)
    for key, tensor in sorted(tensors.items(), key=lambda item: _order(item[0])):
        values = tensor.float().numpy()
        theirs = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, key
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(key.split(".")[-2])
        if heads and name in PAIRS:
            values = _in_pairs(values, config[heads])
        values = values + 1 if name.startswith("gemma") and key.endswith("norm.weight") else values
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
            continue
        kind = Kind[embedding if ".layers." not in key else kinds[turn % len(kinds)]]
        turn += ".layers." in key
        if values.shape[1] % GGML_QUANT_SIZES[kind][0]:  # as llama.cpp does where a row is not whole blocks
            kind = Kind.Q8_0
        writer.add_tensor(theirs, _packed(values, kind, random), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _of_experts(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """gpt-oss' stacks (experts, in, out) and biases, taken out of `tensors`: gate and up, which lie in turn, apart."""
    found = []
    for key in [key for key in tensors if ".mlp.experts." in key]:
        values, prefix = tensors.pop(key), key.rpartition(".")[0]
        kind = "bias" if key.endswith("_bias") else "weight"
        values = values.transpose(1, 2) if kind == "weight" else values
        if "gate_up" in key:
            found += [
                (f"{prefix}.{part}_proj.{kind}", values[:, first::2].contiguous())
                for first, part in enumerate(("gate", "up"))
            ]
        else:
            found.append((f"{prefix}.down_proj.{kind}", values.contiguous()))
    for key in [key for key in tensors if key.endswith(".sinks")]:
        found.append((f"{key}.weight", tensors.pop(key)))
    return found


def weights_of(path: Path, *, n_heads: int, n_kv_heads: int) -> dict[str, torch.Tensor]:
    """The weights of a written file in fp32 by their names there, as the `gguf` package reads them; pairs undone."""
    reader = gguf.GGUFReader(path)
    name = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    found = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tuple(reversed(tensor.shape)))
        heads = n_heads if ".attn_q." in tensor.name else n_kv_heads if ".attn_k." in tensor.name else 0
        if heads and name in PAIRS:
            values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        values = values - 1 if name.startswith("gemma") and tensor.name.endswith("norm.weight") else values
        found[tensor.name] = torch.from_numpy(np.array(values))
    return found


def _order(key: str) -> tuple[int, str]:
    found = re.search(r"layers\.(\d+)\.", key)
    return (int(found[1]) if found else -1, key)


def _in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _packed(values: np.ndarray, kind: Kind, random: np.random.Generator) -> np.ndarray:
    if kind.name not in SCALES:
        return gguf.quantize(values, kind)
    n_elements, n_bytes = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (values.size // n_elements, n_bytes), dtype=np.uint8)
    places, largest = SCALES[kind.name]
    for place in places:
        scale = random.uniform(0.3, 1.0, len(blocks)) * values.shape[1] ** -0.5 / largest
        blocks[:, place : place + 2] = scale.astype(np.float16).reshape(-1, 1).view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def del_key(writer: gguf.GGUFWriter, key: str) -> None:
    """Take a key that was added back, so that a test can give it another value."""
    for values in writer.kv_data:
        values.pop(key, None)


def _vocabulary(writer: gguf.GGUFWriter, source: Path) -> None:
    """The folder's byte-level BPE tokenizer, cut as GPT-2 does (examples/tiny-llama), and its template."""
    values = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = dict(values["model"]["vocab"])
    special = {one["content"]: one["id"] for one in values["added_tokens"]}
    ids |= special
    tokens = sorted(ids, key=lambda token: ids[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]])
    for role, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id),
                      ("pad_token", writer.add_pad_token_id)):  # fmt: skip
        if isinstance(config.get(role), str):
            add(ids[config[role]])
    if (source / "chat_template.jinja").exists():
        writer.add_chat_template((source / "chat_template.jinja").read_text(encoding="utf-8"))


def _metadata(writer: gguf.GGUFWriter, config: dict, name: str) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("full_attention", rope).get("rope_theta", 10_000.0)))
    writer.add_vocab_size(config["vocab_size"])
    if name == "gpt-oss":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.get("sliding_window") and name in ("gemma2", "gemma3", "phi3", "gpt-oss"):
        writer.add_sliding_window(config["sliding_window"])
    for key, ours in EXTRA.get(name, {}).items():
        writer.add_float32(f"{name}.{key}", config[ours])
