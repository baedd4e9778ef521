"""Writes a model folder in the real shape of a public model, with random weights: for benchmarks without a download.

Memory and speed depend on shapes, not on what the weights say. The folder is what `AutoModelForCausalLM` expects:
config.json with the public model's numbers, bfloat16 safetensors, and a tokenizer. The tokenizer is the small one of
examples/tiny-llama, and so are the config's special ids; `vocab_size` stays the real one.

The rules it keeps. One tensor at a time: each is drawn, written and dropped, so a 70B model needs the memory of its
embedding (2.1 GB), not of a shard. A tensor depends on the seed and its name alone: with --layers N the folder holds
the first layers of the full one. A shard gets its final name after the last byte of the last shard.

What it does not do: it does not train, and what the model says is noise. Weights are normal with std 0.02, biases too,
norm weights are 1. With --quantized each matrix is packed as it is drawn, so the full-precision model exists nowhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from lopt_edge.plan.facts.model import facts_from_config
from quant.files import four_bit_layout, four_bit_tensors, quantization_config
from quant.shards import write_sharded

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-llama"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3}  # of that tokenizer
STD = 0.02


@dataclass(frozen=True)
class Shape:
    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    positions: int  # max_position_embeddings
    rope_factor: float | None = None  # Llama 3's frequency scaling


SHAPES = {  # from the public config.json files
    "smollm2-135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, 64, True, 8192),
    "qwen2.5-0.5b": Shape("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True, 32768),
    "qwen2.5-1.5b": Shape("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True, 131072),
    "qwen2.5-7b": Shape("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False, 131072),
    "llama-3.2-1b": Shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, True, 131072, rope_factor=32.0),
    "llama-3.2-3b": Shape("llama", 128256, 3072, 8192, 28, 24, 8, 128, True, 131072, rope_factor=32.0),
    "llama-3.1-8b": Shape("llama", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072, rope_factor=8.0),
    "llama-3.3-70b": Shape("llama", 128256, 8192, 28672, 80, 64, 8, 128, False, 131072, rope_factor=8.0),
    "mistral-7b-v0.3": Shape("mistral", 32768, 4096, 14336, 32, 32, 8, 128, False, 32768),
    "qwen3-8b": Shape("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False, 40960),
    "qwen3-14b": Shape("qwen3", 151936, 5120, 17408, 40, 40, 8, 128, False, 40960),
}


def config(shape: Shape, layers: int) -> PretrainedConfig:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 1e6}
    extras: dict[str, object] = {"rms_norm_eps": 1e-6}
    if shape.family == "llama":
        scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if shape.rope_factor is not None:
            rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": shape.rope_factor, **scaling}
        extras = {"rms_norm_eps": 1e-5, "head_dim": shape.head_dim}
    if shape.family == "mistral":
        extras = {"rms_norm_eps": 1e-5, "head_dim": shape.head_dim, "sliding_window": None}
    if shape.family == "qwen3":
        extras |= {"head_dim": shape.head_dim, "attention_bias": False}
    built = FAMILIES[shape.family](
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        rope_parameters=rope,
        tie_word_embeddings=shape.tied,
        dtype=torch.bfloat16,
        **SPECIAL_IDS,
        **extras,
    )
    built.architectures = [type(built).__name__.replace("Config", "ForCausalLM")]
    return built


def layout(shape: Shape, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and size of every stored tensor, in the order in which data meets them."""
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for index in range(layers):
        for name, size in _layer_layout(shape):
            yield f"model.layers.{index}.{name}", size
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def _layer_layout(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "input_layernorm.weight", (shape.hidden,)
    for projection, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{projection}.weight", (width, shape.hidden)
        if shape.family == "qwen2":
            yield f"self_attn.{projection}.bias", (width,)
    if shape.family == "qwen3":
        yield "self_attn.q_norm.weight", (shape.head_dim,)
        yield "self_attn.k_norm.weight", (shape.head_dim,)
    yield "self_attn.o_proj.weight", (shape.hidden, queries)
    yield "post_attention_layernorm.weight", (shape.hidden,)
    yield "mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
    yield "mlp.up_proj.weight", (shape.intermediate, shape.hidden)
    yield "mlp.down_proj.weight", (shape.hidden, shape.intermediate)


def tensors(shape: Shape, layers: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the model in bfloat16, one after the other; only the one in hand exists."""
    for name, size in layout(shape, layers):
        if name.endswith("norm.weight"):
            yield name, torch.ones(size, dtype=torch.bfloat16)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield name, torch.empty(size, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)


def write_small_files(shape: Shape, layers: int, folder: Path, *, quantized: bool) -> None:
    """Write config.json and the tokenizer."""
    values = config(shape, layers).to_diff_dict()
    values |= {"quantization_config": quantization_config("bfloat16")} if quantized else {}
    (folder / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).exists():
            shutil.copy(TOKENIZER / name, folder / name)


def parse_size(text: str) -> int:
    """The bytes of "2GB" or "500MB" (powers of ten, as transformers counts shards)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 2GB or 500MB")
    return int(float(number) * units[unit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--output", required=True, type=Path, help="a folder that holds no model yet")
    parser.add_argument("--layers", type=int, help="the first N layers only (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=parse_size, default="2GB", help="most bytes of one file (default: 2GB)")
    parser.add_argument("--quantized", action="store_true", help="write it in 4 bits (bitsandbytes NF4) right away")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    layers = shape.layers if options.layers is None else options.layers
    if not 1 <= layers <= shape.layers:
        sys.exit(f"{options.shape} has {shape.layers} layers; --layers must be from 1 to {shape.layers}")
    if any(options.output.glob("*.safetensors")):
        sys.exit(f"{options.output} already holds a model; delete it or name another folder")
    options.output.mkdir(parents=True, exist_ok=True)
    write_small_files(shape, layers, options.output, quantized=options.quantized)
    stored = [(name, "BF16", size) for name, size in layout(shape, layers)]
    stream = tensors(shape, layers, options.seed)
    if options.quantized:
        packs = facts_from_config(config(shape, layers).to_dict(), where=options.shape).packs
        stored, stream = four_bit_layout(stored, packs), four_bit_tensors(stream, packs, dtype=torch.bfloat16)
    total = write_sharded(options.output, stored, stream, shard_bytes=options.shard_size)
    print(f"{options.output}: {options.shape}, {layers} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
