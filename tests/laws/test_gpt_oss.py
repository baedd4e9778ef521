"""gpt-oss from a folder whose experts are in MXFP4, as it is published: logits and gradients follow from the numbers that
transformers' own conversion makes (law 4), streamed weights change nothing (law 3), the planner's bytes are the tracked
ones (law 6), and what a run leaves is read elsewhere (law 8). A full-precision folder of it is a family like any other.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lopt_edge import export, finetune
from lopt_edge.adapters.gguf_export import export_gguf, export_gguf_adapter
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model
from lopt_edge.plan.facts.gguf_architectures import entries_of
from lopt_edge.plan.schedule.knobs import default_knobs
from lopt_edge.run.model.load import load_model
from quant.gguf.header import read_gguf_header
from quant.headers import SINGLE_NAME
from tests.laws.bench import by_rows, make_bench, random_batch
from tests.laws.test_families import LONG, SHORT, our_logits
from tests.laws.test_timeline import check
from tools.timeline_settings import random_setting
from tools.tiny_gguf import write_gguf
from tools.tiny_models import make_folder, tiny_config
from tools.tiny_quantised import write_mxfp4
from tools.tiny_runs import make_config, make_model, save_tokenizer

FAMILY, CPU = "gpt_oss", torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder in MXFP4, and its stacks of experts as the format defines them."""
    root = tmp_path_factory.mktemp("mxfp4")
    source = make_folder(root / "source", FAMILY, dtype=torch.bfloat16)
    return root / "published", write_mxfp4(source, root / "published")


def transformers_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model of that folder, which it converts itself."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return by_rows(model, find_model(str(folder)).facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_transformers(folder, dtype):
    theirs = transformers_model(folder[0], dtype)
    tensors = theirs.state_dict()
    for name, expected in folder[1].items():
        assert torch.equal(tensors[name].float(), expected) and expected.unique().numel() > 30, name
    found = find_model(str(folder[0]))
    assert found.facts.quantised and found.path == folder[0]
    ours = load_model(found.path, found.facts, device=CPU, dtype=dtype)
    for ids_BT in (SHORT, LONG):
        with torch.no_grad():
            reference = theirs(ids_BT, use_cache=False).logits.float()
        assert reference.std() > 0.1 and torch.equal(our_logits(ours, ids_BT), reference)


def test_gradients_are_autograds_and_streamed_weights_change_nothing(folder, tmp_path):
    knobs = default_knobs(find_model(str(folder[0])).facts, "cpu")
    resident = make_bench(folder[0], method="e2e", knobs=knobs)
    streamed = make_bench(
        folder[0], method="e2e", knobs=replace(knobs, weights=("disk",) * 4, prefetch=1), page_dir=tmp_path
    )
    batch = random_batch((13, 8), seed=2)
    found, other = resident.gradients([batch]), streamed.gradients([batch])
    assert found.keys() == other.keys() and all(torch.equal(found[name], other[name]) for name in found)
    model = transformers_model(folder[0], torch.float32).requires_grad_(False)
    for index, layer in enumerate(resident.model.layers):
        for linear in resident.model.facts.layer(index).linears:
            own, module = layer.get_submodule(linear.name), model.model.layers[index].get_submodule(linear.name)
            module.lora = tuple(one.detach().clone().requires_grad_() for one in (own.lora_a, own.lora_b))
            module.register_forward_hook(lambda m, x, y, scale=own.scale: y + scale * (x[0] @ m.lora[0] @ m.lora[1]))
    output = model(batch.ids_BT, use_cache=False).logits.flatten(0, 1)[batch.supervised_N]
    torch.nn.functional.cross_entropy(output, batch.targets_N).backward()
    for index in range(4):
        modules = [model.model.layers[index].get_submodule(f"self_attn.{word}_proj") for word in "qkvo"]
        for number, expected in enumerate(one.grad for module in modules for one in module.lora):
            mine = found[f"layer {index} {number}"]
            assert (mine - expected).norm() <= 2e-5 * expected.norm(), (index, number)


@pytest.mark.parametrize(("number", "form"), [(58, {"form": "mxfp4"}), (12, {"gguf": ("F16", "Q8_0")})])
def test_predicted_bytes_are_the_tracked_ones(tmp_path, number, form):
    check(replace(random_setting(number, family=FAMILY), targets=None, **form), tmp_path)


@pytest.mark.usefixtures("warm_children")
def test_a_run_and_its_merged_model(tmp_path):
    """Two steps on the published folder; what is merged onto it is read by transformers, in the published stacks."""
    write_mxfp4(make_model(tmp_path / "source", FAMILY), tmp_path / "published")
    config = make_config(tmp_path / "published", tmp_path, method="e2e", max_steps=2)
    finetune(config)
    assert json.loads((Path(config.output) / "adapter_config.json").read_text())["base_model_name_or_path"] == config.model
    found = export(config.output, merged=tmp_path / "merged", dtype="float32", cache_dir=config.cache_dir)
    assert found.divergence.mean_kl < 1e-6 and not found.divergence.left_out
    merged, plain = load_file(tmp_path / "merged" / SINGLE_NAME), load_file(tmp_path / "source" / SINGLE_NAME)
    assert {name: one.shape for name, one in merged.items()} == {name: one.shape for name, one in plain.items()}


@pytest.fixture(scope="module")
def gguf(folder, tmp_path_factory) -> Path:
    """The same model as llama.cpp's converter writes it: experts in MXFP4 with gate and up apart, the rest in F32."""
    root = tmp_path_factory.mktemp("gguf")
    shutil.copytree(folder[0].parent / "source", root / "twin")
    tensors = load_file(root / "twin" / SINGLE_NAME)
    tensors |= {name: values.to(torch.bfloat16) for name, values in folder[1].items()}
    save_file(tensors, root / "twin" / SINGLE_NAME, metadata={"format": "pt"})
    return write_gguf(root / "twin", root / "model.gguf", ("F32",), embedding="F32")


def test_a_gguf_file_is_the_published_folder(folder, gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(tmp_path / "cache"))
    found = find_model(str(gguf))
    assert found.facts.forms.experts == (("MXFP4", "MXFP4"),) * 4
    config = type(tiny_config(FAMILY)).from_pretrained(found.path)
    for key in ("rope_parameters", "layer_types", "num_experts_per_tok", "intermediate_size", "head_dim"):
        assert getattr(config, key) == getattr(tiny_config(FAMILY), key), key
    ours = load_model(found.path, found.facts, device=CPU, dtype=torch.float32)
    theirs = transformers_model(folder[0], torch.float32)
    for ids_BT in (SHORT, LONG):
        with torch.no_grad():
            reference = theirs(ids_BT, use_cache=False).logits
        assert torch.equal(our_logits(ours, ids_BT), reference)
    batch, knobs = random_batch((13, 8), seed=2), default_knobs(found.facts, "cpu")
    published = make_bench(folder[0], method="e2e").gradients([batch])
    streamed = replace(knobs, weights=("disk",) * 4, prefetch=1)
    for bench in (
        make_bench(found.path, method="e2e"),
        make_bench(found.path, method="e2e", knobs=streamed, page_dir=tmp_path),
    ):
        gradients = bench.gradients([batch])
        assert gradients.keys() == published.keys() and all(torch.equal(gradients[n], published[n]) for n in gradients)


def test_a_run_on_a_gguf_file_and_what_it_gives(gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(tmp_path / "cache"))
    save_tokenizer(tmp_path / "words", vocab_size=300)
    config = make_config(gguf, tmp_path, method="e2e", max_steps=2, tokenizer=str(tmp_path / "words"))
    finetune(config)
    written = export_gguf_adapter(config.output, tmp_path / "adapter.gguf", cache_dir=config.cache_dir)
    names = {entry.name for entry in read_gguf_header(written.path).entries.values()}
    assert names == {f"blk.{n}.attn_{w}.weight.lora_{x}" for n in range(4) for w in ("q", "k", "v", "output") for x in "ab"}
    with pytest.raises(InputError, match="experts of GptOssForCausalLM are not written as GGUF"):
        export_gguf(config.output, tmp_path / "whole.gguf", cache_dir=config.cache_dir)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ffn_up_exps.weight": {"shape": (4, 32, 64)}}, "differ in shape or form"),
        ({"ffn_down_exps.weight": {"shape": (3, 64, 64)}}, "is not of 4 experts"),
        ({"ffn_gate_exps.bias": None}, "lacks ffn_gate_exps.bias of model.layers.0"),
        ({"ffn_down_exps.bias": {"dtype": "F16"}}, "is not in F32"),
    ],
)
def test_stacks_that_do_not_belong_together_are_refused(gguf, change, words):
    header = read_gguf_header(gguf)
    entries = dict(header.entries)
    for name, values in change.items():
        entry = entries.pop(f"blk.0.{name}")
        entries |= {entry.name: replace(entry, **values)} if values else {}
    with pytest.raises(InputError, match=words):
        entries_of(replace(header, entries=entries))


def test_damaged_folders_are_refused(tmp_path, command):
    write_mxfp4(make_model(tmp_path / "source", FAMILY), tmp_path / "published")
    path, name = tmp_path / "published" / SINGLE_NAME, "model.layers.2.mlp.experts.down_proj_scales"
    tensors = load_file(path)
    scales = tensors.pop(name)
    damaged = scales.clone()
    damaged[3, 5, 0] = 255
    for change, words in (
        ({name: damaged}, "damaged: a scale of"),
        ({name: scales[:, :, :1].contiguous()}, "config.json says U8"),
        ({}, "is missing"),
    ):
        save_file({**tensors, **change}, path)
        code, _, told = command("generate", "--model", tmp_path / "published", "--prompt", "x", "--raw")
        assert code == 2 and words in " ".join(told.split()), told


def test_another_family_in_that_form_is_refused(tmp_path, command):
    folder = make_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, told = command("plan", "--model", folder)
    assert code == 2 and "quantised with 'mxfp4'" in " ".join(told.split())
