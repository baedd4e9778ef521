"""What a run and an export write of the tokenizer: the base's own files, byte for byte, and the template that was used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.models.tokenizer_files import template_in, write_tokenizer_files
from quant.small_files import SMALL_NAMES, TOKENIZER_NAMES, copy_small_files
from tools.tiny_runs import make_model

OWN, USED = "{{ messages[0]['content'] }}<eos>", "used: {{ messages[0]['content'] }}\n"


def make_base(root: Path, *, template: str = "", family: str = "llama", named: str | None = None) -> Path:
    """A model folder as from the hub: in another style than ours, with its template in one of two places."""
    folder = make_model(root / "base", family)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | ({"chat_template": OWN} if template == "config" else {})
    values |= {"tokenizer_class": named} if named else {}
    path.write_text(json.dumps(values, indent=7, sort_keys=True))
    (folder / "special_tokens_map.json").write_text('{"bos_token":   "<bos>"}')
    if template == "file":
        (folder / "chat_template.jinja").write_text(OWN)
    return folder


def write(base: Path, target: Path, template: str | None, *, has_config: bool = True) -> set[str]:
    """Write the files; returns the names of those that are the base's byte for byte."""
    target.mkdir()
    tokenizer = load_tokenizer(base, say=lambda text: None)
    write_tokenizer_files(target, base=base, tokenizer=tokenizer, template=template, has_config=has_config)
    names = {path.name for path in target.iterdir()}
    return {name for name in names if (base / name).exists() and (base / name).read_bytes() == (target / name).read_bytes()}


@pytest.mark.parametrize("place", ["config", "file", ""])
def test_the_own_template_leaves_every_file_as_it_is(tmp_path, place):
    base = make_base(tmp_path, template=place)
    same = write(base, tmp_path / "out", OWN if place else None)
    assert same == {path.name for path in (tmp_path / "out").iterdir()}
    assert same == {path.name for path in base.iterdir()} & {*SMALL_NAMES} - {"generation_config.json"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == (OWN if place else None)


@pytest.mark.parametrize("place", ["config", "file", ""])
def test_a_template_that_was_used_instead_is_what_every_reader_finds(tmp_path, place):
    base = make_base(tmp_path, template=place)
    same = write(base, tmp_path / "out", USED)
    assert {"tokenizer.json", "special_tokens_map.json"} <= same
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config.get("chat_template") == (USED if place == "config" else None)
    assert ("tokenizer_config.json" in same) == (place != "config")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == USED == template_in(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == USED


@pytest.mark.parametrize("has_config", [True, False])
def test_without_a_config_beside_it_the_tokens_stay_those_of_the_file(tmp_path, has_config):
    """Of a qwen2 model with a pipeline of its own; an adapter's folder has no config.json, by which transformers judges."""
    base = make_base(tmp_path, family="qwen2", named="Qwen2Tokenizer")
    same = write(base, tmp_path / "out", None, has_config=has_config)
    assert ("tokenizer_config.json" in same) == has_config
    if not has_config:
        found = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert type(found) is PreTrainedTokenizerFast
        text = "one\ntwo\n\nthree 12345"
        assert found(text)["input_ids"] == load_tokenizer(base, say=lambda text: None)(text)["input_ids"]


def test_a_base_without_a_tokenizer_json(tmp_path):
    """Then nothing stands for itself, and the loaded tokenizer is saved."""
    base = make_base(tmp_path)
    tokenizer = load_tokenizer(base)
    (base / "tokenizer.json").unlink()
    (tmp_path / "out").mkdir()
    write_tokenizer_files(tmp_path / "out", base=base, tokenizer=tokenizer, template=USED, has_config=True)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.get_vocab() == tokenizer.get_vocab() and found.chat_template == USED


def test_what_is_copied_is_named(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    code = (
        "tokenizer.py",
        "tokenizer_evil.py",
        "vocab.py",
        "chat_template.py",
        "LICENSE.py",
        "modeling_x.py",
        "tokenizer.so",
    )
    for name in (*SMALL_NAMES, *code, "anything.json"):
        (source / name).write_text(name)
    (target / "tokenizer.json").write_text("half a file of a run that was killed")
    copy_small_files(source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {name: name for name in SMALL_NAMES}
    assert not any(name.endswith((".py", ".so")) for name in (*SMALL_NAMES, *TOKENIZER_NAMES))
