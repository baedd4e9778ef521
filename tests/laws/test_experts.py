"""Laws 3, 7 and 8 where layers have experts: memory features change nothing, a run that was stopped goes on as if not, and
peft and transformers get our logits from what a run leaves. (Laws 2, 4 and 6 take such a family like any other.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lopt_edge import export, finetune
from lopt_edge.adapters.merge import merged_tensors, tensor_shapes
from lopt_edge.errors import Interrupted
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.plan.costs.sizes import MOST_PAGES
from lopt_edge.plan.facts.families import FAMILIES
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import ADAPTER_NAME, attach_adapters, load_adapters
from lopt_edge.run.tiers.graphs import LayerGraph
from quant.headers import SINGLE_NAME
from tests.laws.bench import make_bench, random_batch, transformers_model
from tests.laws.test_families import LONG, our_logits
from tools.tiny_models import make_folder
from tools.tiny_runs import log_of, make_config, make_model

FAMILY = "qwen3_moe"


@pytest.mark.parametrize("activations", ["keep", "recompute", "page"])
def test_streamed_weights_and_moved_activations_change_nothing(four_bit, tmp_path, activations):
    folder, batch = four_bit(FAMILY), random_batch((13, 8), seed=2)
    plain = make_bench(folder, method="e2e").gradients([batch])
    knobs = Knobs(("disk",) * 4, (activations,) * 4, saved_inputs="disk", prefetch=1)
    found = make_bench(folder, method="e2e", knobs=knobs, page_dir=tmp_path).gradients([batch])
    assert plain.keys() == found.keys() and all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_page_file_has_room_for_all_tensors_of_a_layer(four_bit):
    """With dropout each linear layer with LoRA saves one more; of all families this one's attention layers save most."""
    folder = four_bit("qwen3_5_moe_text")
    model = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=torch.float32)
    attach_adapters(model, [3], targets=model.facts.linear_names, r=2, alpha=4, dropout=0.1)
    hidden = torch.randn(2, 9, model.facts.hidden_size)
    context = model.layer_context(hidden)
    graph = LayerGraph(model.mover, movable=True, constants=context.tensors())
    with torch.enable_grad(), graph.recording():
        graph.end(model.run_layer(3, graph.begin(hidden, needs_gradient=True), context))
    assert MOST_PAGES - 8 < len(graph.pages) <= MOST_PAGES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps that nothing disturbs."""
    root = tmp_path_factory.mktemp("run")
    config = make_config(make_model(root / "model", FAMILY), root, method="e2e", max_steps=3)
    finetune(config)
    return config


def test_a_resumed_run_is_the_undisturbed_one(run, tmp_path, stop_in):
    config = run.model_copy(update={"output": str(tmp_path / "stopped"), "weights": "disk", "activations": "page"})
    stop_in(2, 1)
    with pytest.raises(Interrupted):
        finetune(config)
    finetune(config.model_copy(update={"resume": "auto", "weights": "resident", "activations": "recompute"}))
    assert (Path(config.output) / ADAPTER_NAME).read_bytes() == (Path(run.output) / ADAPTER_NAME).read_bytes()
    assert log_of(config) == log_of(run)


def test_peft_gets_our_logits(run):
    output = Path(run.output)
    folder = Path(json.loads((output / "run.json").read_text())["quantised_folder"])
    theirs = PeftModel.from_pretrained(transformers_model(folder), output).train()
    ours = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=torch.float32)
    before = our_logits(ours, LONG)
    load_adapters(ours, output)
    mine = our_logits(ours, LONG)
    with torch.no_grad():
        reference = theirs(LONG, use_cache=False).logits
    assert (mine - reference).norm() <= 1e-4 * reference.norm()
    assert (mine - before).norm() > 1e-2 * before.norm(), "an adapter that changes nothing would prove nothing"
    names = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(names) == len(load_file(output / ADAPTER_NAME)) == 2 * 4 * 4, "on the attention, and on nothing else"


@pytest.mark.parametrize("family", [name for name, record in FAMILIES.items() if record.experts is not None])
def test_what_is_merged_has_the_published_spelling(tmp_path, family):
    """The tensors out of a 4-bit folder have the names and shapes that save_pretrained gives them, stacks or not."""
    source = find_model(str(make_folder(tmp_path / "model", family)))
    copy = four_bit_folder(source, cache_dir=str(tmp_path))[0]
    model = load_model(copy, source.facts, device=torch.device("cpu"), dtype=torch.float32)
    expected = load_file(source.path / SINGLE_NAME)
    found = dict(merged_tensors(model, copy))
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in expected.items()}
    assert {name: tensor.shape for name, tensor in found.items()} == tensor_shapes(model, copy)
    for name, tensor in found.items():  # 4 bits are near: the right numbers are in the right places
        assert (tensor - expected[name]).norm() <= 0.15 * expected[name].norm(), name


def test_a_merged_folder_is_read_by_transformers(run, tmp_path):
    """The 4-bit experts, unpacked, beside the merged attention; transformers reads them in the export itself."""
    found = export(run.output, merged=tmp_path / "merged", onto="dequantized", dtype="float32", cache_dir=run.cache_dir)
    assert found.divergence.reader == "transformers" and not found.divergence.left_out
    assert found.divergence.mean_kl < 1e-6
