"""Folders that other programs quantised, as base models: every matrix is what its format says, logits and gradients follow
from those (law 4), and the planner's bytes are the tracked ones (law 6)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lopt_edge import export, finetune
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model, tensor_entries
from lopt_edge.models.gguf import facts_of_gguf
from lopt_edge.plan.schedule.knobs import default_knobs
from lopt_edge.run.model.load import load_model
from lopt_edge.run.step.losses import logits
from quant.files import read_bytes, tensor_bytes
from quant.gguf.types import BLOCK_TYPES, parts_bytes
from quant.gguf.unpack import Scratch, new_scratch
from quant.gguf.weight import gguf_layout, read_gguf
from tests.laws.bench import make_bench, random_batch
from tests.laws.test_timeline import check
from tools.timeline_settings import random_setting
from tools.tiny_models import make_folder
from tools.tiny_quantised import FORMS, write_quantised
from tools.tiny_runs import make_config, make_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(tmp_path / "cache"))


def make(folder: Path, form: str, **changes: object) -> tuple[Path, dict[str, Tensor]]:
    make_folder(folder / "source", "llama", **changes)
    return folder / "quantised", write_quantised(folder / "source", folder / "quantised", form)


@pytest.mark.parametrize("form", FORMS)
def test_every_matrix_is_what_its_format_says(tmp_path, form):
    folder, values = make(tmp_path, form, num_hidden_layers=1)
    told, root = list[str](), tmp_path / "cache"
    before = find_model(str(folder), lay_out=False, say=told.append)
    assert not told and not root.exists(), "a plan reads headers, and writes nothing"
    found = find_model(str(folder), say=told.append)
    assert len(told) == 1 and str(found.path) in told[0] and before.facts == found.facts
    assert found.name == before.name == str(folder) and found.facts.quantised
    entries = tensor_entries(found.path)
    scratch = new_scratch(CPU)
    for name, expected in values.items():
        assert torch.equal(read_gguf(entries, name), expected) and expected.unique().numel() > 30, name
        layout, parts = gguf_layout(entries, name), {"scratch": scratch}
        for part, entry in layout.parts.items():
            parts[part] = torch.empty(entry.n_bytes, dtype=torch.uint8)
            read_bytes(entry, tensor_bytes(parts[part]))
        weight = layout.assemble(parts)
        assert weight.n_bytes == sum(parts_bytes(entries[name].dtype, expected.shape))
        part = weight.unpack_part(None, torch.empty(9, expected.shape[1]), rows=slice(5, 14))
        assert torch.equal(part, expected[5:14])
        step = BLOCK_TYPES[entries[name].dtype].block_elements
        part = weight.unpack_part(
            None, torch.empty(len(expected), step), columns=slice(expected.shape[1] - step, expected.shape[1])
        )
        assert torch.equal(part, expected[:, -step:])
        half = weight.unpack_into(torch.empty(expected.shape, dtype=torch.bfloat16))
        assert torch.equal(half, expected.bfloat16())
    plain = load_file(folder / "model.safetensors")
    assert torch.equal(read_gguf(entries, "model.norm.weight"), plain["model.norm.weight"])
    assert Scratch(scratch).position


@pytest.mark.parametrize("form", ["gptq-4-order", "fp8"])
def test_logits_and_gradients_are_those_of_the_matrices(tmp_path, form):
    folder, values = make(tmp_path, form)
    found = find_model(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    theirs.load_state_dict(values, strict=False)
    ours = load_model(found.path, found.facts, device=CPU, dtype=torch.float32)
    batch = random_batch((9, 7))
    with torch.no_grad():
        hidden = ours.embed(batch.ids_BT)
        got = logits(ours, ours.run_all(hidden, ours.layer_context(hidden)).flatten(0, 1))
        expected = theirs(batch.ids_BT).logits.flatten(0, 1)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    knobs = default_knobs(found.facts, "cpu")
    resident = make_bench(found.path, method="e2e", num_segments=1, knobs=knobs)
    streamed = replace(knobs, weights=("disk",) * 4, prefetch=1)
    other = make_bench(found.path, method="e2e", num_segments=1, knobs=streamed, page_dir=tmp_path)
    first, second = resident.gradients([batch]), other.gradients([batch])
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for index, layer in enumerate(resident.model.layers):
        for linear in found.facts.layer(index).linears:
            own = layer.get_submodule(linear.name)
            a, b = (one.detach().clone().requires_grad_() for one in (own.lora_a, own.lora_b))
            module = theirs.model.layers[index].get_submodule(linear.name)
            module.lora = (a, b)
            module.register_forward_hook(lambda m, x, y, scale=own.scale: y + scale * (x[0] @ m.lora[0] @ m.lora[1]))
    output = theirs(batch.ids_BT).logits.flatten(0, 1)[batch.supervised_N]
    torch.nn.functional.cross_entropy(output, batch.targets_N).backward()
    for index in range(4):
        modules = [theirs.model.layers[index].get_submodule(one.name) for one in found.facts.layer(index).linears]
        for number, gradient in enumerate(one.grad for module in modules for one in module.lora):
            assert torch.allclose(first[f"layer {index} {number}"], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("number", "form"), [(12, "gptq-4-order"), (244, "fp8"), (58, "packed-4-zero")])
def test_predicted_bytes_are_the_tracked_ones(tmp_path, number, form):
    setting = random_setting(number)
    changes = setting.changes | {"hidden_size": 256, "intermediate_size": 1536}
    check(replace(setting, family="qwen3", changes=changes, form=form, targets=None), tmp_path)


def test_predicted_bytes_with_experts_are_the_tracked_ones(tmp_path):
    check(replace(random_setting(9, family="qwen3_moe"), form="gptq-4-order", targets=None), tmp_path)


@pytest.mark.usefixtures("warm_children")
def test_a_run_names_the_folder_and_its_merged_model_is_whole(tmp_path):
    write_quantised(make_model(tmp_path / "source"), tmp_path / "quantised", "awq")
    config = make_config(tmp_path / "quantised", tmp_path, method="e2e", max_steps=2)
    finetune(config)
    assert json.loads((Path(config.output) / "adapter_config.json").read_text())["base_model_name_or_path"] == config.model
    found = export(config.output, merged=tmp_path / "merged", dtype="float32", cache_dir=config.cache_dir)
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in merged and found.divergence.mean_kl < 1e-6 and not found.divergence.left_out


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("gptq-4", {"bits": 5}, "bits is '5', known are 2, 3, 4, 8"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "'marlin' is not known"),
        ("gptq-4", {"bits": 8}, "do not belong together"),
        ("awq", {"version": "gemv_fast"}, "'gemv_fast' is not known"),
        ("awq-gemv", {"group_size": 24}, "do not belong together"),
        ("packed-4", {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' is not known"),
        ("packed-4", {"config_groups": 7}, "does not say 4 or 8 num_bits"),
        ("fp8", {"weight_block_size": None}, "weight_block_size is None"),
        ("fp8", {"weight_block_size": [16, 64]}, "is not for"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, form, change, words, command):
    folder, _ = make(tmp_path, form, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    for lay_out in (False, True):
        with pytest.raises(InputError) as refusal:
            find_model(str(folder), lay_out=lay_out, say=lambda text: None)
        assert words in str(refusal.value)
    code, _, told = command("plan", "--model", folder)
    assert code == 2 and words in " ".join(told.split()), told


@pytest.mark.parametrize("form", ["gptq-4", "fp8"])
def test_experts_in_such_a_form(tmp_path, form):
    """As Qwen3-30B-A3B is published: logits and gradients of an attention's adapter follow from the matrices."""
    source = make_folder(tmp_path / "source", "qwen3_moe")
    values = write_quantised(source, tmp_path / "quantised", form)
    assert any(".experts.5.down_proj" in name for name in values)
    save_file(load_file(source / "model.safetensors") | values, source / "model.safetensors", metadata={"format": "pt"})
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(source, **options).requires_grad_(False)
    found, batch = find_model(str(tmp_path / "quantised")), random_batch((9, 7))
    assert [bool(one) for one in found.facts.forms.experts] == [True, True, False, True]
    bench = make_bench(found.path, method="e2e")
    gradients = bench.gradients([batch])
    knobs = replace(default_knobs(found.facts, "cpu"), weights=("disk",) * 4, prefetch=1)
    streamed = make_bench(found.path, method="e2e", knobs=knobs, page_dir=tmp_path).gradients([batch])
    assert all(torch.equal(gradients[name], streamed[name]) for name in gradients)
    own = bench.model.layers[0].self_attn.q_proj
    a, b = (one.detach().clone().requires_grad_() for one in (own.lora_a, own.lora_b))
    for index, layer in enumerate(bench.model.layers):
        for linear in found.facts.layer(index).linears:
            ours = layer.get_submodule(linear.name)
            if ours.lora_a is not None:
                pair = (a, b) if ours is own else (ours.lora_a.detach(), ours.lora_b.detach())
                module = theirs.model.layers[index].get_submodule(linear.name)
                module.register_forward_hook(lambda m, x, y, p=pair, s=ours.scale: y + s * (x[0] @ p[0] @ p[1]))
    output = theirs(batch.ids_BT).logits.flatten(0, 1)[batch.supervised_N]
    torch.nn.functional.cross_entropy(output, batch.targets_N).backward()
    for number, expected in enumerate((a.grad, b.grad)):
        assert (gradients[f"layer 0 {number}"] - expected).norm() <= 2e-5 * expected.norm()


def test_experts_in_several_forms_are_refused(tmp_path):
    write_quantised(make_folder(tmp_path / "source", "qwen3_moe"), tmp_path / "quantised", "gptq-4")
    found = find_model(str(tmp_path / "quantised"))
    entries, name = tensor_entries(found.path), "model.layers.1.mlp.experts.4.up_proj.weight"
    entries[name] = replace(entries[name], dtype="F16")
    with pytest.raises(InputError, match=r"experts of layer 1 are stored in several forms \(F16, INT4_G32_F16\)"):
        facts_of_gguf(found.facts, entries, where="here")


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("gptq-4", lambda index: index.flip(0), "is out of order, and the config says no desc_act"),
        ("gptq-4-order", lambda index: index.clamp(max=0), "does not put 32 of 64 inputs into each of 2 groups"),
        ("gptq-4-order", lambda index: index[1:], "does not put 32 of 64 inputs into each of 2 groups"),
    ],
)
def test_a_wrong_order_of_groups_is_refused(tmp_path, form, change, words):
    folder, _ = make(tmp_path, form, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    name = next(one for one in sorted(tensors) if one.endswith("q_proj.g_idx"))
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=words) as refusal:
        find_model(str(folder), say=lambda text: None)
    assert name.removesuffix(".g_idx") in str(refusal.value)


def test_a_head_in_act_order_is_refused(tmp_path):
    write_quantised(make_folder(tmp_path / "source", "llama"), tmp_path / "quantised", "gptq-4-order")
    found = find_model(str(tmp_path / "quantised"), say=lambda text: None)
    entries = tensor_entries(found.path)
    entries["lm_head.weight"] = replace(entries["lm_head.weight"], dtype="INT4_G32_F16_ORDER")
    with pytest.raises(InputError, match="lm_head is quantised in act-order"):
        facts_of_gguf(found.facts, entries, where="here")
