"""Law 4: for every supported family our layer-by-layer logits equal AutoModelForCausalLM's, on the same 4-bit folder.

The same attention kernel, the same order of operations: bitwise. Two exceptions. transformers caps Gemma 2's logits in
bfloat16, we cap them in fp32 (1.5e-3 relative); with its cap they are bitwise equal too. A delta rule's last chunk, where
it is not whole, has its convolution computed at another width, so fp32 differs in the last bits
(tests/run/model/test_delta_net.py: whole chunks are bitwise).

Sequences shorter and longer than the sliding window (8 tokens) of the families that have one. No model here has dropout.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model, vocabulary_itemsize
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.step.losses import logits
from quant.headers import INDEX_NAME, SINGLE_NAME
from tests.laws.bench import transformers_model
from tools.tiny_models import FAMILIES, make_folder

SHORT, LONG = (torch.randint(3, 320, (2, n), generator=torch.Generator().manual_seed(n)) for n in (6, 21))
WINDOWED = ("mistral", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gemma4_text", "olmo3", "exaone4",
            "gpt_oss")  # fmt: skip


def load_both(folder, dtype: torch.dtype) -> tuple[Model, torch.nn.Module]:
    facts = find_model(str(folder)).facts
    return load_model(folder, facts, device=torch.device("cpu"), dtype=dtype), transformers_model(folder)


@torch.no_grad()
def our_hidden(model: Model, ids_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD = model.embed(ids_BT)
    frame = model.layer_context(hidden_BTD, ids_BT)
    for layer in range(model.facts.n_layers):
        hidden_BTD = model.run_layer(layer, hidden_BTD, frame)
    return hidden_BTD


def our_logits(model: Model, ids_BT: torch.Tensor) -> torch.Tensor:
    return logits(model, our_hidden(model, ids_BT).flatten(0, 1)).view(*ids_BT.shape, -1)


@torch.no_grad()
def capped_in_bfloat16(model: Model, ids_BT: torch.Tensor) -> torch.Tensor:
    normed_BTD = model.norm(our_hidden(model, ids_BT))
    raw = torch.cat([normed_BTD @ rows.t() for _, rows in model.lm_head.chunks(100)], dim=-1)
    cap = model.config.final_logit_softcapping
    return (torch.tanh(raw / cap) * cap).float()


# in bfloat16 by default: those whose arithmetic rounds in a way of its own
ROUNDED = ("gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "granite", "llama", "olmo2", "phi3", "qwen3_5_text",
           "qwen3_moe")  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in sorted(FAMILIES)),
        *(pytest.param(one, torch.bfloat16, marks=() if one in ROUNDED else pytest.mark.long) for one in sorted(FAMILIES)),
    ],
)
def test_logits_equal_transformers(four_bit, family, dtype):
    model, theirs = load_both(four_bit(family, dtype), dtype)
    for ids_BT in (SHORT, LONG):
        ours = our_logits(model, ids_BT)
        with torch.no_grad():
            reference = theirs(ids_BT, use_cache=False).logits.float()
        assert reference.std() > 0.1, "logits that hardly differ would prove nothing"
        if (family, dtype) == ("gemma2", torch.bfloat16):
            assert (ours - reference).norm() <= 3e-3 * reference.norm()
            assert torch.equal(capped_in_bfloat16(model, ids_BT), reference)
        elif any(kind.delta for kind in model.facts.kinds):
            assert (ours - reference).norm() <= 2e-6 * reference.norm()
        else:
            assert torch.equal(ours, reference)


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_matters(four_bit, family):
    """Beyond the window the first token is out of sight of a sliding layer: without the window, other logits."""
    narrow = load_both(four_bit(family), torch.float32)[0]
    wide = load_both(four_bit(family, sliding_window=64), torch.float32)[0]
    assert torch.equal(our_logits(narrow, SHORT), our_logits(wide, SHORT))
    assert not torch.equal(our_logits(narrow, LONG), our_logits(wide, LONG))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_sequence_does_not_see_its_neighbour_or_its_future(four_bit, family):
    model = load_both(four_bit(family), torch.float32)[0]
    both, changed = our_logits(model, LONG), LONG.clone()
    changed[1] = 5
    changed[0, -1] = 7
    again = our_logits(model, changed)
    # an expert's product has its tokens in other rows, where others go to it as well: fp32 may round otherwise there
    bound = 1e-4 if model.facts.family.experts else 0
    torch.testing.assert_close(again[0, :-1], both[0, :-1], rtol=bound, atol=bound)
    assert not torch.equal(again[1], both[1])
    torch.testing.assert_close(our_logits(model, LONG[:1]), both[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["another", "of another dtype", "equal", "none"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_tied_config_beside_a_head_in_the_file(tmp_path, family, head):
    """transformers 5 ties the head to the embedding only if the file has none, or the same one. (4.57 always tied it.)"""
    folder = make_folder(tmp_path / "model", family)
    tensors = load_file(folder / SINGLE_NAME)
    assert find_model(str(folder)).facts.tied and "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    if head != "none":
        other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)) * embedding.std()
        tensors["lm_head.weight"] = embedding.clone() if head == "equal" else other
    if head == "of another dtype":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    source = find_model(str(folder))
    assert source.facts.tied == (head == "none")
    assert vocabulary_itemsize(source) == (2 if head == "of another dtype" else 4)
    copy = four_bit_folder(source, cache_dir=str(tmp_path / "cache"))[0]
    assert json.loads((copy / "config.json").read_text()).get("tie_word_embeddings", True) == (head == "none")
    model, theirs = load_both(copy, torch.float32)
    theirs.lm_head.float()  # which transformers leaves in the file's dtype
    with torch.no_grad():
        assert torch.equal(our_logits(model, SHORT), theirs(SHORT, use_cache=False).logits.float())


def test_a_single_file_beside_an_index(tmp_path):
    """transformers reads model.safetensors, whatever an index beside it says."""
    folder = make_folder(tmp_path / "model")
    tensors = load_file(folder / SINGLE_NAME)
    shard = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(shard, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(shard, "model-00001-of-00001.safetensors")}))
    ours, wanted = our_embedding(folder), tensors["model.embed_tokens.weight"]
    theirs = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(ours, theirs) and torch.equal(ours, wanted)
    (folder / SINGLE_NAME).unlink()
    assert torch.equal(our_embedding(folder), wanted + 1)


def our_embedding(folder) -> torch.Tensor:
    model = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=torch.float32)
    return model.embedding.rows(torch.arange(320))


def test_weights_under_a_name_of_their_own_are_refused(tmp_path):
    folder = make_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(InputError, match=r"transformers_weights.*other\.safetensors"):
        find_model(str(folder))
