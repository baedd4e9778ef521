"""Law 8: what a real run leaves in its output folder, plain peft loads onto the same 4-bit base with our logits.

In the dtype that the folder records: within 1e-4 in float32, 2e-2 in bfloat16, relative. The adapters come out of real
training steps with a high learning rate, so that they change the logits by far more than that.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lopt_edge import export, finetune
from lopt_edge.errors import InputError, Interrupted
from lopt_edge.models.folder import find_model
from lopt_edge.run.model.adapter_config import ADAPTER_CONFIG_NAME
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import ADAPTER_NAME, adapter_tensors, load_adapters
from lopt_edge.training.session.progress import Progress
from tests.laws.test_families import our_logits
from tools.tiny_runs import make_config, make_model

IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """dtype -> a model folder with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return {dtype: make_model(root / dtype, dtype=getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}


def quantised(config) -> Path:
    return Path(json.loads((Path(config.output) / "run.json").read_text())["quantised_folder"])


def ours(config, adapter: Path | None) -> torch.Tensor:
    folder = quantised(config)
    dtype = getattr(torch, config.compute_dtype)
    model = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=dtype)
    if adapter is not None:
        load_adapters(model, adapter)
    return our_logits(model, IDS)


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lopt", "e2e", "frozen"])
def test_plain_peft_gives_our_logits(models, tmp_path, method, dtype):
    config = make_config(models[dtype], tmp_path, method=method, compute_dtype=dtype, max_steps=3)
    finetune(config)
    output = Path(config.output)
    base = AutoModelForCausalLM.from_pretrained(quantised(config))
    theirs = PeftModel.from_pretrained(base, output).train()
    with torch.no_grad():
        reference = theirs(IDS, use_cache=False).logits.float()
    bound = 1e-4 if dtype == "float32" else 2e-2
    mine = ours(config, output)
    assert difference(mine, reference) <= bound
    assert difference(mine, ours(config, None)) > 5 * bound, "an adapter that changes nothing would prove nothing"
    saved = json.loads((output / ADAPTER_CONFIG_NAME).read_text())
    assert saved["layers_to_transform"] == ([2, 3] if method == "frozen" else None)
    assert saved["base_model_name_or_path"] == str(models[dtype].resolve())
    assert len(load_file(output / ADAPTER_NAME)) == 2 * 7 * (2 if method == "frozen" else 4)
    carried = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(carried) == len(load_file(output / ADAPTER_NAME)), "peft makes no other adapter, and misses none"


@pytest.mark.parametrize("settings", [{"method": "lcsb"}, {"method": "top-layers", "train_layers": 3}, {"open_every": 2},
                                      {"method": "segprop", "stages": 2}, {"method": "let"},
                                      {"method": "let-local"}, {"local_loss": "align"},
                                      {"local_every": 0}, {"boundary_update": "fresh"}])  # fmt: skip
def test_the_adapter_of_every_method_loads(models, tmp_path, settings):
    config = make_config(models["float32"], tmp_path, max_steps=3, **settings)
    finetune(config)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantised(config)), config.output).train()
    with torch.no_grad():
        reference = theirs(IDS, use_cache=False).logits.float()
    assert difference(ours(config, Path(config.output)), reference) <= 1e-4
    assert difference(ours(config, None), reference) > 1e-3


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text"])
def test_other_families_and_chosen_targets(tmp_path, family):
    """Fused projections, biases, tied embeddings; adapters on some modules only, alpha / r that is no integer."""
    model = make_model(tmp_path / "model", family)
    targets = "qkv_proj,down_proj" if family == "phi3" else "q_proj,down_proj"
    config = make_config(model, tmp_path, lora_targets=targets, lora_alpha=5.5, max_steps=2)
    finetune(config)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantised(config)), config.output).train()
    with torch.no_grad():
        reference = theirs(IDS, use_cache=False).logits.float()
    mine = ours(config, Path(config.output))
    assert difference(mine, reference) <= 1e-4
    assert difference(mine, ours(config, None)) > 1e-3


def test_a_run_goes_on_from_an_adapter(models, tmp_path):
    """--init-adapter: a step of next to nothing gives the adapter back, real steps move on from there."""
    first = make_config(models["float32"], tmp_path, max_steps=3)
    finetune(first)
    second = make_config(
        models["float32"], tmp_path, output="second", max_steps=1, init_adapter=first.output, warmup_ratio=0.9, lr=1e-9
    )
    finetune(second)
    before, after = (load_file(Path(config.output) / ADAPTER_NAME) for config in (first, second))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
    third = make_config(models["float32"], tmp_path, output="third", max_steps=2, init_adapter=first.output)
    finetune(third)
    moved = load_file(Path(third.output) / ADAPTER_NAME)
    assert all(not torch.equal(moved[name], before[name]) for name in before)


@pytest.mark.usefixtures("warm_children")
def test_a_rslora_adapter_of_peft_goes_on_as_it_is(models, tmp_path, stop_in):
    """peft makes it, we train on from it (stopped and resumed), peft loads the result: alpha / sqrt(r) all the way."""
    base = AutoModelForCausalLM.from_pretrained(models["float32"])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=True, init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(base, shape).save_pretrained(tmp_path / "first")
    config = make_config(models["float32"], tmp_path, max_steps=2, n_rows=8, init_adapter=str(tmp_path / "first"), lr=1e-3)
    stop_in(2, 0)
    with pytest.raises(Interrupted):
        finetune(config)
    finetune(config.model_copy(update={"resume": "auto"}))
    for adapter in (tmp_path / "first", Path(config.output)):
        assert json.loads((adapter / ADAPTER_CONFIG_NAME).read_text())["use_rslora"] is True
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantised(config)), adapter).train()
        mine = ours(config, adapter)
        with torch.no_grad():
            assert difference(mine, theirs(IDS, use_cache=False).logits.float()) <= 1e-5
            plain = AutoModelForCausalLM.from_pretrained(models["float32"])
            merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()(IDS, use_cache=False).logits
        export(adapter, merged=adapter / "merged", dtype="float32", cache_dir=config.cache_dir)
        with torch.no_grad():
            exported = AutoModelForCausalLM.from_pretrained(adapter / "merged")(IDS, use_cache=False).logits
        assert difference(exported, merged) <= 1e-5
        assert difference(mine, ours(config, None)) > 1e-2
    before, after = (load_file(adapter / ADAPTER_NAME) for adapter in (tmp_path / "first", Path(config.output)))
    assert all(0 < (before[name] - after[name]).abs().max() < 0.01 for name in before), "it moved, and not far"


def test_adapter_config_is_the_same_bytes_for_the_same_run(models, tmp_path):
    """peft's own writer puts target_modules, a set, down in hash order, which is another in each process."""
    config = make_config(models["float32"], tmp_path, max_steps=1)
    finetune(config)
    text = (Path(config.output) / ADAPTER_CONFIG_NAME).read_text()
    values = json.loads(text)
    assert values["target_modules"] == sorted(values["target_modules"]) and len(values["target_modules"]) == 7
    assert list(values) == sorted(values) == sorted(LoraConfig().to_dict())
    LoraConfig.from_pretrained(config.output).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / ADAPTER_CONFIG_NAME).read_text())
    assert theirs | {"target_modules": sorted(theirs["target_modules"])} == values


def test_an_adapter_of_another_model_is_told(models, tmp_path):
    first = make_config(models["float32"], tmp_path, max_steps=1)
    finetune(first)
    listener = Listener()
    other = make_model(tmp_path / "other", seed=1)
    finetune(make_config(other, tmp_path, output="second", max_steps=1, init_adapter=first.output), listener)
    assert any("is not the model that the adapter" in text for text in listener.said)
    listener.said.clear()
    finetune(make_config(models["float32"], tmp_path, output="third", max_steps=1, init_adapter=first.output), listener)
    assert not any("is not the model" in text for text in listener.said)


class Listener(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_frozen_layers_keep_the_adapter_that_they_came_with(models, tmp_path):
    first = make_config(models["float32"], tmp_path, max_steps=2)
    finetune(first)
    second = make_config(
        models["float32"], tmp_path, output="second", max_steps=2, init_adapter=first.output, method="frozen"
    )
    finetune(second)
    before, after = (load_file(Path(config.output) / ADAPTER_NAME) for config in (first, second))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (int(name.split(".layers.")[1].split(".")[0]) < 2), name
    saved = json.loads((Path(second.output) / ADAPTER_CONFIG_NAME).read_text())
    assert saved["layers_to_transform"] is None


def test_loading_gives_back_what_was_saved(models, tmp_path):
    config = make_config(models["float32"], tmp_path, max_steps=1, method="frozen")
    finetune(config)
    folder = quantised(config)
    model = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=torch.float32)
    assert load_adapters(model, Path(config.output)) == [2, 3]
    saved = load_file(Path(config.output) / ADAPTER_NAME)
    loaded = adapter_tensors(model)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.fixture
def adapter(models, tmp_path) -> Path:
    config = make_config(models["float32"], tmp_path, output="adapter", max_steps=1)
    finetune(config)
    return Path(config.output)


@pytest.mark.parametrize(
    "changes",
    [{"lora_r": 8}, {"lora_alpha": 16}, {"lora_targets": "q_proj"}, {"lora_r": 8, "lora_alpha": 16}],
)
def test_an_adapter_of_another_shape_is_refused_to_start_from(models, tmp_path, adapter, changes):
    config = make_config(models["float32"], tmp_path, max_steps=1, init_adapter=str(adapter), **changes)
    with pytest.raises(InputError, match="init_adapter"):
        finetune(config)
    assert not Path(config.output).exists()


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def changed(tensors: dict[str, torch.Tensor], part: str, change) -> dict[str, torch.Tensor]:
    return {name: change(tensor).contiguous() if part in name else tensor for name, tensor in tensors.items()}


BROKEN = {
    "wrong size": lambda t: changed(t, "q_proj.lora_A", lambda a: a[:, :-1]),
    "ranks differ": lambda t: changed(t, "lora_B", lambda b: b[:, :2]),
    "rank zero": lambda t: changed(changed(t, "lora_B", lambda b: b[:, :0]), "lora_A", lambda a: a[:0]),
    "three axes": lambda t: changed(t, "q_proj", lambda a: a.unsqueeze(0)),
    "a layer too many": lambda t: renamed(t, "layers.3.", "layers.4."),
    "another module": lambda t: renamed(t, "q_proj", "c_attn"),
    "half a pair": lambda t: {name: a for name, a in t.items() if "layers.2.mlp.up_proj.lora_B" not in name},
    "nothing": lambda t: {},
    "not finite": lambda t: changed(t, "layers.1.mlp.down_proj.lora_B", lambda b: b * torch.nan),
}


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_do_not_fit_are_refused(models, tmp_path, adapter, name):
    tensors = load_file(adapter / ADAPTER_NAME)
    save_file(BROKEN[name](tensors), adapter / ADAPTER_NAME)
    config = make_config(models["float32"], tmp_path, max_steps=1, init_adapter=str(adapter))
    with pytest.raises(InputError, match="adapter"):
        finetune(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    "changes",
    [{"peft_type": "IA3"}, {"lora_alpha": "8"}, {"lora_alpha": None}, {"use_dora": True}, {"bias": "all"},
     {"rank_pattern": {"q_proj": 8}}, {"modules_to_save": ["lm_head"]}, {"alora_invocation_tokens": [5, 6]},
     {"a_key_of_tomorrow": 0.5}, {"r": 8}, {"target_modules": ["q_proj"]}, {"layers_to_transform": [0, 1]},
     {"exclude_modules": ["mlp.up_proj"]}],
)  # fmt: skip
def test_adapter_kinds_that_are_not_ours_are_refused(models, tmp_path, adapter, changes):
    path = adapter / ADAPTER_CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match="adapter"):
        finetune(make_config(models["float32"], tmp_path, max_steps=1, init_adapter=str(adapter)))


def test_missing_and_truncated_adapters_are_refused(models, tmp_path, adapter):
    content = (adapter / ADAPTER_NAME).read_bytes()
    (adapter / ADAPTER_NAME).write_bytes(content[: len(content) // 2])
    config = make_config(models["float32"], tmp_path, max_steps=1, init_adapter=str(adapter))
    with pytest.raises(InputError, match="truncated"):
        finetune(config)
    (adapter / ADAPTER_NAME).unlink()
    with pytest.raises(InputError, match="file not found"):
        finetune(config)
