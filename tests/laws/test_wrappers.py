"""A text model inside a multimodal one: the published class gives our logits, peft finds our adapter, and the vision part
of an exported folder is that of the base, byte for byte."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lopt_edge import export, finetune
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.plan.facts.families import FAMILIES as RECORDS
from lopt_edge.plan.facts.families import WRAPPERS as WRAPPER_RECORDS
from lopt_edge.run.model import load
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import load_adapters
from tests.laws.bench import transformers_model
from tests.laws.test_families import LONG, SHORT, our_logits
from tests.pairs import pairs
from tools.tiny_models import WRAPPERS, make_folder
from tools.tiny_runs import make_config, make_model

_OLD = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
_FLAT = {"visual.": "model.visual.", "model.": "model.language_model."}
# Whose checkpoints have other names than transformers 5 has in memory, and which.
RENAMED = {"gemma3": _OLD, "mistral3": _OLD, "qwen2_vl": _FLAT, "qwen2_5_vl": _FLAT}


def renamed(folder: Path, names: dict[str, str]) -> Path:
    """The folder with its tensors named as transformers 5 names them in memory."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        start = next(start for start in names if name.startswith(start))
        tensors[names[start] + name.removeprefix(start)] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def their_logits(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """The published class' logits of texts; Gemma 3 wants to be told in training that no token is of an image."""
    told = {"token_type_ids": torch.zeros_like(ids_BT)} if model.config.model_type == "gemma3" else {}
    return model(ids_BT, **told, use_cache=False).logits.float()


def is_vision(name: str) -> bool:
    return any(word in name for word in ("vision", "visual", "projector"))


def test_every_wrapper_has_a_tiny_model():
    assert WRAPPERS.keys() == WRAPPER_RECORDS.keys()
    assert all(record.text in RECORDS for record in WRAPPER_RECORDS.values())


@pytest.mark.parametrize(("name", "dtype", "in_memory"), pairs(WRAPPERS, [torch.float32, torch.bfloat16], [False, True]))
def test_logits_equal_the_published_class(tmp_path, name, dtype, in_memory):
    source = make_folder(tmp_path / "source", name, dtype=dtype)
    found = find_model(str(renamed(source, RENAMED[name]) if in_memory and name in RENAMED else source))
    folder, _ = four_bit_folder(found, cache_dir=str(tmp_path / "cache"))
    theirs = transformers_model(folder)
    seen = {type(part).__name__ for key, part in theirs.named_modules() if is_vision(key)}
    assert "Linear" in seen and "Linear4bit" not in seen, "what is not trained stays as it is"
    ours = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=dtype)
    for ids_BT in (SHORT, LONG):
        reference = their_logits(theirs, ids_BT)
        assert reference.std() > 0.1
        mine = our_logits(ours, ids_BT)
        bound = 2e-6 if any(kind.delta for kind in ours.facts.kinds) else 0  # as in test_families.py
        assert (mine - reference).norm() <= bound * reference.norm()


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_vision_part_is_never_read(four_bit, name, monkeypatch):
    read = []
    one, among = load.read_tensor, load.read_gguf
    monkeypatch.setattr(load, "read_tensor", lambda entry: read.append(entry.name) or one(entry))
    monkeypatch.setattr(load, "read_gguf", lambda entries, name: read.append(entries[name].name) or among(entries, name))
    folder = four_bit(name)
    load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=torch.float32)
    assert read and not [name for name in read if is_vision(name)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> the settings of a finished run on a tiny model of that wrapper."""
    made = {}
    for name in WRAPPERS:
        root = tmp_path_factory.mktemp(name)
        made[name] = make_config(make_model(root / "model", name), root, method="e2e", max_steps=3, eval_fraction=0.3)
        finetune(made[name])
    return made


@pytest.mark.parametrize("name", WRAPPERS)
def test_peft_puts_the_adapter_on_the_published_class(runs, name):
    output = Path(runs[name].output)
    folder = Path(json.loads((output / "run.json").read_text())["quantised_folder"])
    base = transformers_model(folder)
    before = their_logits(base, LONG)
    theirs = PeftModel.from_pretrained(base, output).train()
    after = their_logits(theirs, LONG)
    ours = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=torch.float32)
    load_adapters(ours, output)
    mine = our_logits(ours, LONG)
    assert (mine - after).norm() <= 1e-4 * after.norm()
    assert (mine - before).norm() > 1e-2 * before.norm()
    names = {key for key, _ in theirs.named_parameters() if "lora_" in key}
    n_linears = sum(len(ours.facts.layer(layer).linears) for layer in range(ours.facts.n_layers))
    assert len(names) == len(load_file(output / "adapter_model.safetensors")) == 2 * n_linears
    assert not [key for key in names if is_vision(key)]


@pytest.mark.parametrize(("name", "onto"), [*zip(WRAPPERS, cycle(["original", "dequantized"]), strict=False)])
@pytest.mark.usefixtures("warm_children")
def test_a_merged_folder_keeps_the_rest(runs, tmp_path, name, onto):
    """Each wrapper onto one base, in turn: where its tensors lie and what they are made of do not know of each other."""
    config = runs[name]
    found = export(config.output, merged=tmp_path / "merged", onto=onto, dtype="float32", cache_dir=config.cache_dir)
    base, merged = (load_file(Path(folder) / "model.safetensors") for folder in (config.model, tmp_path / "merged"))
    assert base.keys() == merged.keys()
    facts = find_model(config.model).facts
    for key, tensor in base.items():
        assert torch.equal(tensor, merged[key]) != facts.packs(key), key
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").train()
    assert their_logits(theirs, LONG).isfinite().all()
    assert found.divergence.reader.startswith("transformers") and not found.divergence.left_out


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"text_config": None}, "text_config is not an object"),
        ({"text_config": {"model_type": "gpt2"}}, "model_type 'gpt2' is not supported"),
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
    ],
)
def test_what_is_no_text_model_of_ours_is_refused(tmp_path, change, what):
    folder = make_folder(tmp_path / "m", "gemma3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=what):
        find_model(str(folder))
