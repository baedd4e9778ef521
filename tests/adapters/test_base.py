"""The model that an adapter belongs to: named by its config, given where that has moved, told where it is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lopt_edge import export, finetune
from lopt_edge.adapters.base import base_of
from lopt_edge.adapters.generation import generate
from lopt_edge.errors import InputError
from lopt_edge.run.model.adapter_config import ADAPTER_CONFIG_NAME
from quant.untrusted import printable
from tools.tiny_runs import make_config, make_model

GREEDY = ("--max-new-tokens", 4, "--device", "cpu", "--compute-dtype", "float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(settings, folder) of a finished run."""
    root = tmp_path_factory.mktemp("made")
    config = make_config(make_model(root / "base"), root, max_steps=1)
    finetune(config)
    return config, Path(config.output)


@pytest.fixture
def run(made, tmp_path):
    """The same, in a place of its own."""
    config, output = made
    shutil.copytree(output, tmp_path / "adapter")
    return config, tmp_path / "adapter"


def set_config(adapter: Path, **values: object) -> None:
    path = adapter / ADAPTER_CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_generate_and_export_need_no_model_beside_an_adapter(run, tmp_path, command):
    config, adapter = run
    cache = ("--cache-dir", config.cache_dir)
    alone = command("generate", "--adapter", adapter, "--prompt", "What is 1?", *GREEDY, *cache)
    given = command("generate", "--model", config.model, "--adapter", adapter, "--prompt", "What is 1?", *GREEDY, *cache)
    assert alone == given and alone[0] == 0 and "warning" not in alone[2]
    loading = {"cache_dir": config.cache_dir, "device": "cpu", "compute_dtype": "float32"}
    assert printable(generate(None, "What is 1?", adapter=str(adapter), max_new_tokens=4, **loading)) == alone[1].strip()


def test_neither_a_model_nor_an_adapter(command):
    code, _, told = command("generate", "--prompt", "x")
    assert code == 2 and "--model" in told and "--adapter" in told


@pytest.mark.parametrize("base", ["/nowhere/at/all", None])
def test_a_base_that_is_not_there(run, tmp_path, command, base):
    config, adapter = run
    set_config(adapter, base_model_name_or_path=base)
    for words in (("generate", "--prompt", "x", "--adapter", adapter), ("export", adapter, "--merged", tmp_path / "m")):
        code, _, told = command(*words)
        assert code == 2 and "--model" in told and "adapter_config.json names" in told, told
    code, _, told = command("generate", "--model", config.model, "--adapter", adapter, "--prompt", "x", *GREEDY,
                            "--cache-dir", config.cache_dir)  # fmt: skip
    assert code == 0 and "warning" not in told


@pytest.mark.usefixtures("warm_children")
def test_a_base_that_moved_is_given(run, tmp_path):
    config, adapter = run
    moved, said = shutil.copytree(config.model, tmp_path / "moved"), list[str]()
    set_config(adapter, base_model_name_or_path="/nowhere")
    export(adapter, merged=tmp_path / "merged", model=str(moved), cache_dir=config.cache_dir, say=said.append)
    assert not said
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("known", [True, False])
def test_another_model_of_the_same_shape_is_told(run, tmp_path, known):
    """By the fingerprint in run.json; for an adapter from elsewhere by that of the base that its config names."""
    config, adapter = run
    other = make_model(tmp_path / "other", seed=1)
    if not known:
        (adapter / "run.json").unlink()
    for model, wanted in ((str(other), 1), (config.model, 0), (None, 0)):
        said: list[str] = []
        base_of(adapter, model=model, say=said.append)
        assert len(said) == wanted
        assert not said or ("not the model" in said[0] and config.model in said[0])
    own_copy = json.loads((Path(config.output) / "run.json").read_text())["quantised_folder"]
    base_of(adapter, model=own_copy, say=pytest.fail) if known else None


def test_a_base_that_changed_in_its_place_is_told(run, tmp_path):
    config, adapter = run
    said: list[str] = []
    shutil.copytree(config.model, tmp_path / "base")
    set_config(adapter, base_model_name_or_path=str(tmp_path / "base"))
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(values | {"rope_theta": 5.0}))
    base_of(adapter, model=None, say=said.append)
    assert len(said) == 1 and "not the model" in said[0]


def test_a_model_of_another_shape_is_refused(run, tmp_path):
    config, adapter = run
    other = make_model(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(InputError, match="adapter"):
        generate(str(other), "x", adapter=str(adapter), cache_dir=config.cache_dir, device="cpu", say=lambda text: None)
