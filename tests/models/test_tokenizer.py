"""The tokens are those of tokenizer.json, whatever class transformers chooses for the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lopt_edge.models.tokenizer import PROBES, TOKENIZER_NAME, load_tokenizer
from tools.tiny_runs import CORPUS, make_model

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"


def folder_of(root: Path, *, named: str | None = "LlamaTokenizerFast", family: str = "qwen2") -> Path:
    """A model of this family whose tokenizer_config.json names this class."""
    folder = make_model(root / "model", family)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_class": named, "chat_template": TEMPLATE}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def raw_ids(folder: Path) -> list[list[int]]:
    raw = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
    return [raw.encode(text, add_special_tokens=False).ids for text in PROBES]


def ids(tokenizer) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None])
def test_another_pipeline_in_the_file_wins_over_the_class(tmp_path, named):
    """transformers makes a Qwen2Tokenizer of every qwen2 model, with Qwen2's way to cut texts."""
    folder, said = folder_of(tmp_path, named=named), list[str]()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == "Qwen2Tokenizer" and ids(theirs) != raw_ids(folder), "else nothing is to be mended"
    found = load_tokenizer(folder, say=said.append)
    assert ids(found) == raw_ids(folder)
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert found.chat_template == TEMPLATE
    (note,) = said
    assert "tokenizer.json" in note and "Qwen2Tokenizer" in note and "PreTrainedTokenizerFast" in note
    assert found.get_vocab() == Tokenizer.from_file(str(folder / TOKENIZER_NAME)).get_vocab(), "no token was added"


def test_the_class_own_pipeline_is_left_alone(tmp_path):
    """A file with Qwen2's own pipeline: transformers' class, and not a word."""
    folder, said = folder_of(tmp_path), list[str]()
    path = folder / TOKENIZER_NAME
    theirs = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    raw = Tokenizer.from_file(str(path))
    raw.normalizer, raw.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    raw.save(str(path))
    found = load_tokenizer(folder, say=said.append)
    assert type(found).__name__ == "Qwen2Tokenizer" and ids(found) == raw_ids(folder) and not said


@pytest.mark.parametrize("what", ["normalizer", "pre_tokenizer", "byte_fallback"])
def test_one_difference_is_enough(tmp_path, what):
    folder, said = folder_of(tmp_path), list[str]()
    path = folder / TOKENIZER_NAME
    theirs = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    raw = Tokenizer.from_file(str(path))
    raw.normalizer, raw.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    if what == "normalizer":
        raw.normalizer = normalizers.Lowercase()
    elif what == "pre_tokenizer":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        assert isinstance(raw.model, BPE)
        raw.model.byte_fallback = True
    raw.save(str(path))
    found = load_tokenizer(folder, say=said.append)
    assert type(found) is PreTrainedTokenizerFast and ids(found) == raw_ids(folder)
    assert bool(said) == (what != "byte_fallback"), "where no probe differs nothing is said"


def test_a_file_that_stands_for_itself(tmp_path):
    folder, said = folder_of(tmp_path, named="PreTrainedTokenizerFast", family="llama"), list[str]()
    found = load_tokenizer(folder, say=said.append)
    assert type(found) is PreTrainedTokenizerFast and ids(found) == raw_ids(folder) and not said
    assert found(CORPUS[0])["input_ids"]


def test_the_words_after_a_special_token_are_those_of_a_llama_2_file(tmp_path):
    """Its normaliser puts a blank before every piece of text; transformers' Llama class only before the first."""
    folder, said = folder_of(tmp_path, named="LlamaTokenizer", family="llama"), list[str]()
    raw = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    raw.train_from_iterator(CORPUS, BpeTrainer(vocab_size=600, special_tokens=special + bytes_, show_progress=False))
    raw.save(str(folder / TOKENIZER_NAME))
    text = "<eos>four<eos>blue"
    wanted = raw.encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"] != wanted
    found = load_tokenizer(folder, say=said.append)
    assert found(text, add_special_tokens=False)["input_ids"] == wanted and ids(found) == raw_ids(folder)
    assert len(said) == 1 and "LlamaTokenizer" in said[0]
