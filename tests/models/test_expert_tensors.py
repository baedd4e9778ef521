"""Experts by matrix, whichever way a folder spells them: stacks as transformers 5 has them in memory, or one by one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopt_edge.errors import InputError
from lopt_edge.models.folder import check_weights, find_model, tensor_entries
from lopt_edge.models.four_bit import four_bit_folder
from quant.files import read_tensor
from quant.headers import SINGLE_NAME
from tools.tiny_models import make_folder

FAMILY = "qwen3_moe"


def stacked(tensors: dict[str, torch.Tensor], layers: tuple[int, ...], *, count: int = 6) -> dict[str, torch.Tensor]:
    """The tensors with the experts of these layers in two stacks."""
    found = dict(tensors)
    for layer in layers:
        head = f"model.layers.{layer}.mlp.experts."
        parts = {
            name: [found.pop(f"{head}{i}.{name}.weight") for i in range(count)]
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        found[f"{head}gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        )
        found[f"{head}down_proj"] = torch.stack(parts["down_proj"])
    return found


def test_both_spellings_are_one_model(tmp_path):
    folder = make_folder(tmp_path / "published", FAMILY)
    tensors = load_file(folder / SINGLE_NAME)
    (tmp_path / "stacked").mkdir()
    save_file(stacked(tensors, (0, 3)), tmp_path / "stacked" / SINGLE_NAME)  # layer 1 stays as it is, 2 has no experts
    (tmp_path / "stacked" / "config.json").write_text((folder / "config.json").read_text())
    model = find_model(str(tmp_path / "stacked"))
    entries = tensor_entries(model.path, model.facts)
    assert {name: read_tensor(entry).tolist() for name, entry in entries.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    check_weights(model, entries)
    copies = [
        four_bit_folder(find_model(str(tmp_path / name)), cache_dir=str(tmp_path / "cache"))[0]
        for name in ("published", "stacked")
    ]
    ours, theirs = (load_file(copy / SINGLE_NAME) for copy in copies)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "model.layers.3.mlp.experts.5.down_proj.weight.absmax" in ours


FIRST = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(f"{FIRST}4.up_proj.weight"), r"experts\.4\.up_proj\.weight is missing"),
        (lambda tensors: tensors.update({f"{FIRST}0.down_proj.weight": torch.ones(64, 32)}), "has shape"),
        (lambda tensors: tensors.update({f"{FIRST}gate_up_proj": torch.ones(5, 128, 64)}), "config.json says"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit_are_refused(tmp_path, change, words):
    folder = make_folder(tmp_path / "model", FAMILY)
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME)
    model = find_model(str(folder))
    with pytest.raises(InputError, match=words):
        check_weights(model, tensor_entries(model.path, model.facts))
