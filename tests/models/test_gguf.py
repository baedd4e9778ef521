"""A GGUF file as a model: its folder in the cache, its tokenizer, and what is refused with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model, tensor_entries
from lopt_edge.models.tokenizer import PROBES, load_tokenizer
from lopt_edge.plan.facts.gguf_architectures import LLAMA3_ROPES, _stretch
from tools.tiny_gguf import write_gguf

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_gguf(TINY, tmp_path_factory.mktemp("gguf") / "tiny.gguf", ("Q8_0",), vocabulary=True)


def test_its_folder_says_whose_it_is(tiny, tmp_path):
    found = find_model(str(tiny))
    assert (found.name, found.facts.tied, found.facts.forms.embedding) == (str(tiny), True, "F16")
    assert found.path.parent == tmp_path / "cache" / "gguf" and find_model(str(tiny)).path == found.path
    moved = Path(shutil.copy(tiny, tmp_path / "sha256-0123"))  # as Ollama keeps it, without a suffix
    assert find_model(str(moved)).path != found.path
    data = bytearray(moved.read_bytes())
    other = find_model(str(moved))
    data[40] ^= 1
    moved.write_bytes(data + b"\0" * 64)
    with pytest.raises(InputError, match="not the file"):
        tensor_entries(other.path)
    moved.unlink()
    with pytest.raises(InputError, match="not found"):
        tensor_entries(other.path)


def test_its_tokens_are_those_of_the_tokenizer_it_was_made_from(tiny):
    ours, theirs = load_tokenizer(find_model(str(tiny)).path), AutoTokenizer.from_pretrained(TINY)
    for text in PROBES:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token, ours.bos_token, ours.pad_token) == (theirs.eos_token, theirs.bos_token, theirs.pad_token)


def test_a_tokenizer_beside_the_file(tiny, tmp_path):
    found = find_model(str(tiny), tokenizer=str(TINY))
    assert (found.path / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert found.path != find_model(str(tiny)).path
    with pytest.raises(InputError, match="has neither"):
        find_model(str(tiny), tokenizer=str(tmp_path))
    with pytest.raises(InputError, match="for a GGUF file"):
        find_model(str(TINY), tokenizer=str(TINY))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"general.architecture": "mamba"}, "architecture is 'mamba'"),
        ({"llama.expert_count": 8}, "says llama.expert_count = 8"),
        ({"llama.rope.scaling.type": "yarn"}, "stretches its rotation by 'yarn'"),
        ({"llama.attention.value_length": 16}, "whose values have 16"),
        ({"llama.attention.head_count": 5}, "num_attention_heads|heads cannot have"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, changes, sentence):
    path = write_gguf(TINY, tmp_path / "x.gguf", ("Q8_0",), metadata=changes)
    with pytest.raises(InputError, match=sentence):
        tensor_entries(find_model(str(path)).path)


def test_a_way_to_cut_texts_that_is_not_known_is_refused(tmp_path):
    path = write_gguf(TINY, tmp_path / "x.gguf", ("Q8_0",), vocabulary=True, metadata={"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(InputError, match="'tekken', which is not known") as error:
        load_tokenizer(find_model(str(path)).path)
    assert "--tokenizer DIR" in str(error.value)
    load_tokenizer(find_model(str(path), tokenizer=str(TINY)).path)


def test_llama_3s_rotation_is_recognised_by_its_table(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for rope in LLAMA3_ROPES:
        config = LlamaConfig(head_dim=32, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **rope})
        inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        factors = [5e5 ** (-2 * i / 32) / value for i, value in enumerate(inverse.tolist())]
        ours = [_stretch(5e5 ** (2 * i / 32), **rope) for i in range(16)]
        assert ours == pytest.approx(factors, rel=1e-5) and min(ours) == 1 and max(ours) == rope["factor"]
        path = write_gguf(TINY, tmp_path / "x.gguf", ("Q8_0",), metadata={"llama.rope.freq_base": 5e5}, frequencies=factors)
        made = json.loads((find_model(str(path)).path / "config.json").read_text())
        assert made["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 5e5, **rope}
    path = write_gguf(TINY, tmp_path / "x.gguf", ("Q8_0",), frequencies=factors[::-1])
    with pytest.raises(InputError, match="not the table of a rule"):
        find_model(str(path))
