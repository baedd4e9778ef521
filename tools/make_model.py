"""Writes a model folder in the real shape of a public model, with random weights: for benchmarks without a download.

    python tools/make_model.py --shape qwen2.5-0.5b --output /tmp/model [--layers N] [--quantized]

Memory and speed depend on shapes, not on what the weights say. A shape is a preset of `lopt-edge models`. The folder is
what `AutoModelForCausalLM` expects: config.json with the public model's numbers, bfloat16 safetensors under the names that
transformers' own class saves them by, and a tokenizer. The tokenizer is the small one of examples/tiny-llama, and so are
the config's special ids; `vocab_size` stays the real one. Of a multimodal model it is the text model alone.

The rules it keeps. One tensor at a time: each is drawn, written and dropped, so a 70B model needs the memory of its
embedding (2.1 GB), not of a shard. A tensor depends on the seed and its name alone: with --layers N the folder holds
the first layers of the full one. A shard gets its final name after the last byte of the last shard.

What it does not do: it does not train, and what the model says is noise. Weights are normal with std 0.02, biases too,
norm weights and scalars are 1. With --quantized each matrix is packed as it is drawn, so the full-precision model exists
nowhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.plan.facts.presets import find_preset
from quant.files import four_bit_layout, four_bit_tensors, quantization_config
from quant.shards import write_sharded

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-llama"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3}  # of that tokenizer
STD = 0.02


def config_of(shape: str, layers: int | None) -> PretrainedConfig:
    """The config of a shape, or of its first layers. Exits for what is no shape, or has not as many."""
    preset = find_preset(shape)
    if preset is None:
        sys.exit(f"no shape {shape!r}: use a preset of `lopt-edge models`")
    values = dict(preset.config)
    depth = values["num_hidden_layers"]
    if not 1 <= (layers or depth) <= depth:
        sys.exit(f"{shape} has {depth} layers; --layers must be from 1 to {depth}")
    if layers is not None:
        values["num_hidden_layers"] = layers
        values |= {"layer_types": values["layer_types"][:layers]} if "layer_types" in values else {}
    values |= {"dtype": "bfloat16", **SPECIAL_IDS}
    values.pop("torch_dtype", None)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def layout(config: PretrainedConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The name and size of every tensor that transformers' class of this config saves; sets the config's `architectures`.

    Exits where the first layers alone are no model (keys that they share lie further up)."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        sys.exit(f"{config.num_hidden_layers} layers of {config.model_type} are no model: {error}")
    config.architectures = [type(model).__name__]
    stored = revert_weight_conversion(model, model.state_dict())
    return [(name, tuple(tensor.shape)) for name, tensor in stored.items() if name not in model.all_tied_weights_keys]


def tensors(layout: list[tuple[str, tuple[int, ...]]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the model in bfloat16, one after the other; only the one in hand exists."""
    for name, size in layout:
        if name.endswith(("norm.weight", "scalar")):
            yield name, torch.ones(size, dtype=torch.bfloat16)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield name, torch.empty(size, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)


def write_small_files(config: PretrainedConfig, folder: Path, *, quantized: bool) -> None:
    """Write config.json and the tokenizer."""
    values = config.to_diff_dict()
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
    parser.add_argument("--shape", required=True, help="a preset of `lopt-edge models`")
    parser.add_argument("--output", required=True, type=Path, help="a folder that holds no model yet")
    parser.add_argument("--layers", type=int, help="the first N layers only (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=parse_size, default="2GB", help="most bytes of one file (default: 2GB)")
    parser.add_argument("--quantized", action="store_true", help="write it in 4 bits (bitsandbytes NF4) right away")
    options = parser.parse_args()
    config = config_of(options.shape, options.layers)
    if any(options.output.glob("*.safetensors")):
        sys.exit(f"{options.output} already holds a model; delete it or name another folder")
    options.output.mkdir(parents=True, exist_ok=True)
    names = layout(config)
    write_small_files(config, options.output, quantized=options.quantized)
    stored, stream = [(name, "BF16", size) for name, size in names], tensors(names, options.seed)
    if options.quantized:
        packs = facts_from_config(config.to_dict(), where=options.shape).packs
        stored, stream = four_bit_layout(stored, packs), four_bit_tensors(stream, packs, dtype=torch.bfloat16)
    total = write_sharded(options.output, stored, stream, shard_bytes=options.shard_size)
    print(f"{options.output}: {options.shape}, {config.num_hidden_layers} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
