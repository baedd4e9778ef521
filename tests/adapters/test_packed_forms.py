"""A merged model in NF4 is, tensor for tensor, what transformers makes of the merged model and saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lopt_edge import export, finetune
from lopt_edge.adapters.merge import EXPORT_NAME
from lopt_edge.errors import InputError
from quant.files import STATE_SUFFIX
from tools.tiny_runs import make_config, make_model

pytestmark = pytest.mark.usefixtures("warm_children")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    config = make_config(make_model(root / "model", "llama", dtype=torch.bfloat16), root, max_steps=2)
    finetune(config)
    return config


def test_the_folder_is_what_transformers_packs_and_saves(run, tmp_path, command):
    cache = ("--cache-dir", run.cache_dir)
    code, out, _ = command("export", run.output, "--merged", tmp_path / "nf4", "--form", "nf4", *cache)
    assert code == 0 and "MiB in nf4, merged onto the original" in out and "read by transformers" in out
    export(run.output, merged=tmp_path / "plain", cache_dir=run.cache_dir)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how.bnb_4bit_compute_dtype = torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("nf4", "theirs"))
    assert ours.keys() == wanted.keys() and sum(STATE_SUFFIX in name for name in ours) == 28
    for name, tensor in wanted.items():
        if STATE_SUFFIX in name:
            assert _state(ours[name]) == _state(tensor), name
        else:
            assert torch.equal(ours[name], tensor), name
    said, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("nf4", "theirs"))
    assert said["quantization_config"].items() <= saved["quantization_config"].items()
    told = json.loads((tmp_path / "nf4" / EXPORT_NAME).read_text())
    assert told["form"] == "nf4" and 0 < told["mean_kl"] < 0.1
    assert told["mean_kl"] > json.loads((tmp_path / "plain" / EXPORT_NAME).read_text())["mean_kl"] / 10


def _state(tensor: torch.Tensor) -> dict:
    return json.loads(bytes(tensor.tolist()))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("gptq", "auto-round .* --format auto_gptq"),
        ("awq", "--format auto_awq"),
        ("int8", "q8_0"),
        ("int3", "'int3' is unknown"),
    ],
)
def test_what_is_not_written_is_refused_with_the_way_to_it(run, tmp_path, form, told):
    with pytest.raises(InputError, match=told):
        export(run.output, merged=tmp_path / "merged", form=form)
    assert not Path(tmp_path / "merged").exists()


def test_quantize_takes_the_same_forms(tmp_path, command):
    code, _, err = command("quantize", tmp_path, tmp_path / "packed", "--form", "gptq")
    assert code == 2 and "auto-round" in err and not (tmp_path / "packed").exists()


def test_stacks_of_experts_are_refused_and_the_option_alone_as_well(tmp_path, command, run):
    config = make_config(make_model(tmp_path / "moe", "qwen3_moe"), tmp_path, max_steps=1)
    finetune(config)
    with pytest.raises(InputError, match="has experts"):
        export(config.output, merged=tmp_path / "merged", form="nf4")
    code, _, err = command("export", run.output, "--form", "nf4", "--gguf", tmp_path / "a.gguf")
    assert code == 2 and "has no effect without --merged" in err
