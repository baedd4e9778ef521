"""GGUF files as base models: our logits are those of transformers on the weights that the `gguf` package reads (law 4),
gradients those of autograd, and the planner's bytes the tracked ones (law 6)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt_edge.models.folder import find_model, tensor_entries
from lopt_edge.models.gguf_written import Target, _keys
from lopt_edge.plan.facts.gguf_architectures import architecture_of, entries_of
from lopt_edge.plan.schedule.knobs import default_knobs
from lopt_edge.run.model.load import load_model
from lopt_edge.run.step.losses import logits
from quant.gguf.header import read_gguf_header
from quant.gguf.types import TYPES
from quant.headers import read_json
from tests.laws.bench import make_bench, random_batch
from tests.laws.test_timeline import check
from tools.timeline_settings import method_setting, random_setting
from tools.tiny_gguf import weights_of, write_gguf
from tools.tiny_models import make_folder, tiny_config

CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "head_dim": 64}  # K types: rows of 256
KINDS = tuple(TYPES)
# sliding_window_pattern of Gemma 3 is known to llama.cpp, and the file does not say it
ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "llama": {"attention_bias": True}, "qwen2": {}, "qwen3": {"use_sliding_window": False},
    "smollm3": {"no_rope_layer_interval": 4}, "olmo2": {}, "phi3": {}, "granite": {}, "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 6, "num_hidden_layers": 7, "rope_parameters": ROPE},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(tmp_path / "cache"))


def make_gguf(folder: Path, family: str = "llama", kinds: tuple[str, ...] = ("Q8_0",), embedding="F16", **changes) -> Path:
    return write_gguf(make_folder(folder / "source", family, **changes), folder / "model.gguf", kinds, embedding=embedding)


def theirs(path: Path) -> torch.nn.Module:
    """transformers' model of the folder that a file was made from, with the weights of the file, as `gguf` reads them."""
    model = AutoModelForCausalLM.from_pretrained(path.parent / "source", dtype=torch.float32)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    stored = weights_of(path, n_heads=heads[0], n_kv_heads=heads[1])
    found = {name: stored[entry_name] for name, entry_name in names_in(path).items()}
    missing = model.load_state_dict(found, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    return model.eval()


def names_in(path: Path) -> dict[str, str]:
    """Our names of the tensors -> those in the file, by where they lie."""
    by_place = {entry.start: name for name, entry in read_gguf_header(path).entries.items()}
    return {name: by_place[entry.start] for name, entry in tensor_entries(find_model(str(path)).path).items()}


def assert_same_logits(path: Path) -> None:
    found = find_model(str(path))
    ours = load_model(found.path, found.facts, device=CPU, dtype=torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        hidden = ours.embed(ids)
        got = logits(ours, ours.run_all(hidden, ours.layer_context(hidden))[0])
        expected = theirs(path)(ids).logits[0]
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, family):
    assert_same_logits(make_gguf(tmp_path, family, **FAMILIES[family]))


@pytest.mark.parametrize("embedding", ["Q6_K", "BF16"])
def test_logits_with_every_type(tmp_path, embedding):
    path = make_gguf(tmp_path, "llama", KINDS, embedding, **WIDE)
    kinds = find_model(str(path)).facts.forms
    assert {kind for layer in kinds.layers for kind in layer} == {*KINDS} and kinds.embedding == embedding
    assert_same_logits(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_would_write_is_what_was_read(tmp_path, family):
    """Names, orders of rows, offsets and metadata, the other way round: as tiny_gguf.py has them."""
    path = make_gguf(tmp_path, family, **FAMILIES[family])
    header, source = read_gguf_header(path), find_model(str(path.parent / "source"))
    name, kind = architecture_of(header)
    heads = source.facts.n_heads, source.facts.n_kv_heads
    target = Target(name, kind, _keys(source, read_json(source.path / "config.json"), name, kind), *heads)
    for ours, entry in entries_of(header).items():
        assert header.entries[target.tensor(ours, source.facts.layout)].start == entry.start, ours
        assert (target.heads(ours), target.offset(ours)) == (entry.rotary_heads, entry.offset), ours
    own = {key: value for key, value in header.metadata.items() if key.startswith(f"{name}.")}
    assert {key: value for key, (_, _, value) in target.metadata.items() if key in own} == pytest.approx(own)


def test_the_config_is_the_one_it_was_made_from(tmp_path):
    for family in ("llama", "qwen3", "granite"):
        config = tiny_config(family, **FAMILIES[family])
        path = make_gguf(tmp_path / family, family, **FAMILIES[family]) if (tmp_path / family).mkdir() is None else None
        found = find_model(str(path))
        made = type(config).from_pretrained(found.path)
        for key in ("rms_norm_eps", "rope_parameters", "head_dim", "max_position_embeddings", "vocab_size"):
            assert getattr(made, key) == getattr(config, key), key
        assert (found.name, found.facts.tied, found.facts.quantised) == (str(path), config.tie_word_embeddings, True)


def test_streaming_and_gradients_are_those_of_autograd(tmp_path):
    path = make_gguf(tmp_path, "llama", ("Q4_K", "Q6_K", "Q5_0", "IQ4_XS"), "Q6_K", **WIDE)
    found = find_model(str(path))
    knobs = default_knobs(found.facts, "cpu")
    streamed = replace(knobs, weights=("disk",) * 5, prefetch=1)
    batches = [random_batch((9, 7))]
    resident = make_bench(found.path, method="e2e", num_segments=1, knobs=knobs)
    other = make_bench(found.path, method="e2e", num_segments=1, knobs=streamed, page_dir=tmp_path)
    first, second = resident.gradients(batches), other.gradients(batches)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    plain = theirs(path)
    batch = batches[0]
    for index, layer in enumerate(resident.model.layers):
        for linear in found.facts.layer(index).linears:
            ours = layer.get_submodule(linear.name)
            a, b = (one.detach().clone().requires_grad_() for one in (ours.lora_a, ours.lora_b))
            module = plain.model.layers[index].get_submodule(linear.name)
            module.lora = (a, b)
            module.register_forward_hook(lambda m, x, y, scale=ours.scale: y + scale * (x[0] @ m.lora[0] @ m.lora[1]))
    output = plain(batch.ids_BT).logits.flatten(0, 1)[batch.supervised_N]
    torch.nn.functional.cross_entropy(output, batch.targets_N, reduction="mean").backward()
    for index in range(5):
        modules = [plain.model.layers[index].get_submodule(linear.name) for linear in found.facts.layer(index).linears]
        expected = [one.grad for module in modules for one in module.lora]
        for number, gradient in enumerate(expected):
            assert torch.allclose(first[f"layer {index} {number}"], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("number", [12, 58, 244])
def test_predicted_bytes_are_the_tracked_ones(tmp_path, number):
    setting = random_setting(number) if number != 58 else method_setting(58, "lopt", boundary_update="fresh")
    changes = setting.changes | {"hidden_size": 256, "intermediate_size": 1536}
    setting = replace(
        setting, family="qwen3", changes=changes, gguf=("Q4_K", "Q6_K", "F16", "Q5_1", "IQ4_XS"), targets=None
    )
    check(setting, tmp_path)
