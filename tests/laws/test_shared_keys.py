"""Layers that attend to an earlier layer's keys and values, and that are told of each token anew (Gemma 4 E2B, E4B).

Law 4: bitwise transformers' logits. Law 1: gradients of keys go back to the layer that made them as in one autograd graph,
bitwise, inside a segment; across a boundary they are detached. Law 2: transformers' own with peft. Law 3: what is kept,
recomputed or moved changes no bit. Law 6: planned bytes are tracked bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lopt_edge import export, finetune
from lopt_edge.adapters.generation import Sampling, generate_ids
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.planning.settings import against_facts
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import load_adapters
from lopt_edge.run.step.batches import window_totals
from lopt_edge.run.step.losses import logits, task_loss
from tests.laws.bench import LOCAL_WEIGHT, Bench, in_a_row, make_bench, random_batch
from tests.laws.test_families import LONG, SHORT, load_both, our_logits
from tests.laws.test_plain_autograd import PADDED, SINGLE, check_end_to_end
from tests.laws.test_timeline import check as check_bytes
from tests.laws.test_wrappers import their_logits
from tools.timeline_settings import Setting
from tools.tiny_models import GEMMA4_E
from tools.tiny_runs import make_config, make_model

FAMILY = "gemma4_text"
BATCH = random_batch((13, 9), seed=1)


@pytest.fixture(scope="module")
def folder(four_bit) -> Path:
    return four_bit(FAMILY, **GEMMA4_E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_transformers(four_bit, dtype):
    model, theirs = load_both(four_bit(FAMILY, dtype, **GEMMA4_E), dtype)
    for ids_BT in (SHORT, LONG):
        with torch.no_grad():
            reference = theirs(ids_BT, use_cache=False).logits.float()
        assert reference.std() > 0.1
        assert torch.equal(our_logits(model, ids_BT), reference)


def single_graph(bench: Bench, batch) -> None:
    """LoPT's loss in one autograd graph; hidden states, keys and values are detached at each boundary."""
    model, totals = bench.model, window_totals([batch])
    n_local = sum(segment.loss == "reconstruct" for segment in bench.plan.segments)
    total, hidden = torch.zeros(()), model.embed(batch.ids_BT)
    frame = model.layer_context(hidden, batch.ids_BT)
    for segment in bench.plan.segments:
        entering = hidden = hidden.detach()
        frame.keys = {kind: (key.detach(), value.detach()) for kind, (key, value) in frame.keys.items()}
        for layer in segment.layers:
            hidden = model.run_layer(layer, hidden, frame)
        flat = hidden.flatten(0, 1)
        if segment.has_head:
            rows = batch.real_N
            local = bench.heads[segment.index](flat[rows], entering.flatten(0, 1)[rows])
            total = total + local * (1.0 / (totals.tokens * flat.shape[1])) * (LOCAL_WEIGHT / n_local)
        else:
            total = total + task_loss(model, flat[batch.supervised_N], batch.targets_N) * (1.0 / totals.supervised)
    total.backward()


@pytest.mark.parametrize("num_segments", [1, 2, 3])  # of 7, 4 and 3 layers at first: the sources' readers all, some or none
def test_gradients_are_those_of_one_graph(folder, num_segments):
    bench = make_bench(folder, num_segments=num_segments)
    ours = bench.gradients([BATCH])
    single_graph(bench, BATCH)
    theirs = bench.take_gradients()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, theirs[name]), name


def test_gradients_go_back_to_the_layer_that_made_the_keys(folder):
    """In a plan in which they did not, the gradients of a source's keys would be others: cut where its readers begin."""
    whole, cut = make_bench(folder, num_segments=1), make_bench(folder, num_segments=2, boundary_layers=(4,))
    ours, apart = (bench.gradients([BATCH]) for bench in (whole, cut))
    layer = next(name for name in ours if name.startswith("layer 3 "))
    assert not torch.equal(ours[layer], apart[layer])


@pytest.mark.parametrize("batch", [SINGLE, PADDED], ids=["single", "padded"])
def test_gradients_equal_transformers_and_peft(folder, batch):
    check_end_to_end(folder, batch, bound=4e-5)  # measured: 2.4e-5 over seven layers


@pytest.mark.parametrize("num_segments", [1, 2])
def test_memory_features_change_no_bit(folder, tmp_path, num_segments):
    """Kept, recomputed and paged graphs, streamed weights, spilled inputs: the same gradients."""
    plain = make_bench(folder, num_segments=num_segments).gradients([BATCH])
    pages = Knobs(("disk", "resident") * 3 + ("disk",), ("page",) * 7, saved_inputs="disk", states="disk", prefetch=1)
    mixed = Knobs(("resident",) * 7, ("page", "keep", "recompute", "page", "keep", "recompute", "page"), prefetch=0)
    for number, knobs in enumerate((pages, mixed)):
        page_dir = tmp_path / str(number)
        page_dir.mkdir()
        bench = make_bench(folder, num_segments=num_segments, knobs=knobs, page_dir=page_dir)
        moved = bench.gradients([BATCH])
        bench.executor.mover.close()
        assert all(torch.equal(plain[name], gradient) for name, gradient in moved.items())


def test_a_packed_row_is_its_sequences(folder):
    alone = [random_batch((length,), seed=length) for length in (12, 5, 17)]
    expected = make_bench(folder, num_segments=2, n_micro_batches=3).gradients(alone)
    packed = make_bench(folder, num_segments=2).gradients([in_a_row(alone)])
    for name, gradient in packed.items():
        assert (gradient - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


@torch.no_grad()
def test_generation_with_a_cache_is_that_without(folder):
    model = load_both(folder, torch.float32)[0]
    sampling, ids = Sampling(temperature=0.0, max_new_tokens=6), SHORT[0].tolist()  # beyond the window of 8
    made = list(generate_ids(model, ids, sampling, stop=[]))
    for token in made:
        ids_BT = torch.tensor([ids])
        hidden = model.embed(ids_BT)
        hidden = model.run_all(hidden, model.layer_context(hidden, ids_BT))
        assert int(logits(model, hidden[0, -1:])[0].argmax()) == token
        ids.append(token)


KNOBS = (
    Knobs(("resident",) * 7, ("recompute",) * 7, prefetch=0),
    Knobs(("disk",) * 7, ("keep", "recompute", "page", "keep", "recompute", "page", "keep"), saved_inputs="disk"),
    Knobs(("resident", "disk") * 3 + ("disk",), ("page",) * 7, gradients="disk", states="disk"),
)
NAMES = ("q_proj", "o_proj", "gate_proj", "per_layer_projection")


@pytest.mark.parametrize(
    "setting",
    [
        Setting(FAMILY, torch.float32, ((60, 41),), KNOBS[0], changes=GEMMA4_E),
        Setting(FAMILY, torch.bfloat16, ((90,),), KNOBS[1], "lopt", 2, GEMMA4_E, NAMES, stored=torch.bfloat16),
        Setting(FAMILY, torch.float32, ((70,), (33,)), KNOBS[2], "lopt", 3, GEMMA4_E | {"sliding_window": 4096}),
        Setting(FAMILY, torch.bfloat16, ((30, 64),), KNOBS[0], "frozen", 2, GEMMA4_E | {"num_key_value_heads": 1}),
        Setting(FAMILY, torch.float32, ((20, 31, 9),), KNOBS[1], "lopt", 2, GEMMA4_E, packed=True),
        Setting(FAMILY, torch.float32, ((50,),), KNOBS[0], "lopt", 2, GEMMA4_E, ("per_layer_input_gate",), dropout=0.1),
        Setting(FAMILY, torch.bfloat16, ((40,),), KNOBS[2], "e2e", 1, GEMMA4_E, ("q_proj", "k_proj", "up_proj")),
    ],
    ids=["e2e", "lopt", "windowless", "frozen", "packed", "gate", "keys"],
)
def test_predicted_bytes_are_the_tracked_ones(tmp_path, setting):
    check_bytes(setting, tmp_path)


@pytest.mark.parametrize(
    ("values", "where", "what"),
    [
        ({"method": "mlaan", "num_segments": 3}, "method", "overlapping windows"),
        ({"method": "frozen", "boundary_cache": "x", "boundary_layers": (3,)}, "boundary_cache", "keys of layers 2, 3"),
        ({"method": "lopt", "pipeline": 2}, "pipeline", "told of each token anew"),
    ],
)
def test_what_keys_cannot_cross_is_refused(folder, values, where, what):
    with pytest.raises(InputError, match=what) as refused:
        against_facts(Config(model="m", data="d", output="o", **values), find_model(str(folder)).facts)
    assert refused.value.where == where


def test_a_cache_before_the_sources_is_used(folder):
    config = Config(model="m", data="d", output="o", method="frozen", boundary_cache="x", boundary_layers=(2,))
    assert against_facts(config, find_model(str(folder)).facts)[0].caches


# inside its multimodal model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Config:
    """A finished run on the published class; its folder also has keys of the layers that do not use them, as hubs have."""
    root = tmp_path_factory.mktemp("published")
    folder = make_model(root / "model", "gemma4", **GEMMA4_E)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if ".layers.3.self_attn." in name and any(word in name for word in ("k_proj", "v_proj", "k_norm")):
            tensors[name.replace(".layers.3.", ".layers.6.")] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = make_config(folder, root, method="lopt", max_steps=3, eval_fraction=0.3)
    finetune(config)
    return config


def test_peft_puts_the_adapter_on_the_published_class(finished):
    output = Path(finished.output)
    folder = Path(json.loads((output / "run.json").read_text())["quantised_folder"])
    base = AutoModelForImageTextToText.from_pretrained(folder).train()
    ours = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=torch.float32)
    before, mine = their_logits(base, LONG), our_logits(ours, LONG)
    assert torch.equal(mine, before)
    load_adapters(ours, output)
    theirs = PeftModel.from_pretrained(base, output).train()
    after, mine = their_logits(theirs, LONG), our_logits(ours, LONG)
    assert (mine - after).norm() <= 1e-4 * after.norm()
    assert (mine - before).norm() > 1e-2 * before.norm()
    n_linears = sum(len(ours.facts.layer(layer).linears) for layer in range(7))
    assert len(load_file(output / "adapter_model.safetensors")) == 2 * n_linears


@pytest.mark.usefixtures("warm_children")
def test_a_merged_folder_keeps_the_rest(finished, tmp_path):
    export(finished.output, merged=tmp_path / "merged", onto="original", dtype="float32", cache_dir=finished.cache_dir)
    base, merged = (load_file(Path(folder) / "model.safetensors") for folder in (finished.model, tmp_path / "merged"))
    facts, unused = find_model(finished.model).facts, ".layers.6.self_attn."
    assert base.keys() == merged.keys()
    for key, tensor in base.items():
        stays = not facts.packs(key) or (unused in key and ("k_proj" in key or "v_proj" in key))
        assert torch.equal(tensor, merged[key]) == stays, key
