"""Loading: weights that do not belong to config.json are told before anything runs; what is loaded shares what it can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.run.model.load import Model, load_model
from quant.linear import PackedLinear
from tools.tiny_models import make_folder

CPU = torch.device("cpu")
LAYER = "model.layers.1."


def load(folder: Path, cache: Path) -> Model:
    found = find_model(str(folder))
    quantised, _ = four_bit_folder(found, cache_dir=str(cache))
    return load_model(quantised, found.facts, device=CPU, dtype=torch.float32)


CHANGES = {
    "a matrix is missing": lambda t: t.pop(f"{LAYER}mlp.up_proj.weight"),
    "a matrix of another shape": lambda t: t.update({f"{LAYER}mlp.up_proj.weight": torch.ones(64, 128)}),
    "a matrix of integers": lambda t: t.update({f"{LAYER}mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int8)}),
    "no embedding": lambda t: t.pop("model.embed_tokens.weight"),
    "a norm is missing": lambda t: t.pop(f"{LAYER}input_layernorm.weight"),
    "a norm of one number": lambda t: t.update({f"{LAYER}input_layernorm.weight": torch.ones(1)}),
    "a final norm of another size": lambda t: t.update({"model.norm.weight": torch.ones(32)}),
    "a bias is missing": lambda t: t.pop(f"{LAYER}self_attn.q_proj.bias"),
    "a bias of one number": lambda t: t.update({f"{LAYER}self_attn.q_proj.bias": torch.ones(1)}),
    "no final norm": lambda t: t.pop("model.norm.weight"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, name):
    folder = make_folder(tmp_path / "source", "qwen2")
    load(folder, tmp_path / "cache")
    tensors = load_file(folder / "model.safetensors")
    CHANGES[name](tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="model"):
        load(folder, tmp_path / "cache")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 128},
        {"intermediate_size": 64},
        {"num_hidden_layers": 5},
        {"num_key_value_heads": 4},
        {"vocab_size": 321},
    ],
)
def test_a_packed_folder_with_another_config_is_refused(tmp_path, four_bit, changes):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in four_bit("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(InputError):
        load(folder, tmp_path / "cache")


def test_fewer_layers_than_the_folder_holds_are_the_first_ones(tmp_path, four_bit):
    """Not a mistake: tools cut models this way. The rest is not read."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in four_bit("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    assert len(load(folder, tmp_path / "cache").layers) == 2


def test_layers_share_code_maps_and_one_unpack_buffer(four_bit):
    folder = four_bit("llama")
    model = load_model(folder, find_model(str(folder)).facts, device=CPU, dtype=torch.float32)
    linears = [module for layer in model.layers for module in layer.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 4 * 7
    assert len({linear.weight.code_map.data_ptr() for linear in linears}) == 1
    assert len({linear.weight.nested_map.data_ptr() for linear in linears}) == 1
    assert len({id(linear.buffer) for linear in linears}) == 1
    assert len({linear.position for linear in linears}) == len(linears), "each has dropout masks of its own"
    assert all(linear.clock is model.clock for linear in linears)
    assert not any(p.requires_grad for layer in model.layers for p in layer.parameters())
    assert not any(layer.training for layer in model.layers)
