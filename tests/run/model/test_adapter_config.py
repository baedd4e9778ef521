"""adapter_config.json against the installed peft: every field is known, and what is on and unknown is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lopt_edge.errors import InputError
from lopt_edge.run.model.adapter_config import (
    ADAPTER_CONFIG_NAME,
    DEFAULTS,
    HARMLESS,
    KINDS,
    READ,
    AdapterConfig,
    read_adapter_config,
)

OFF_BY_DEFAULT = {"fan_in_fan_out", "rank_pattern", "alpha_pattern", "megatron_config", "lora_bias", "target_parameters"}


def config_of(folder: Path, **values: Any) -> AdapterConfig:
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8} | values))
    return read_adapter_config(folder)


def test_every_field_of_the_installed_peft_is_known():
    """A new one fails here: decide what it means, then name it."""
    found = {field.name for field in fields(LoraConfig)} - {"runtime_config"}  # that one is never saved
    assert found <= {*READ, *HARMLESS, *DEFAULTS, *KINDS, *OFF_BY_DEFAULT}


def test_what_peft_writes_by_default_is_read(tmp_path):
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    found = read_adapter_config(tmp_path)
    assert (found.rank, found.alpha, found.rslora, found.targets) == (4, 8, False, ("q_proj",))
    assert found.scale(4) == 2 and found.selects(0, "self_attn.q_proj") and not found.selects(0, "self_attn.k_proj")


@pytest.mark.parametrize("key", [*KINDS, *sorted(OFF_BY_DEFAULT), "bias", "a_key_of_tomorrow"])
def test_a_key_that_is_on_and_not_ours_is_refused_by_name(tmp_path, key):
    off = DEFAULTS.get(key)
    assert config_of(tmp_path, **{key: off}).scale(8) == 1
    with pytest.raises(InputError, match=f"{key}.*not supported"):
        config_of(tmp_path, **{key: "all"})


def test_keys_that_only_say_where_it_comes_from_are_taken(tmp_path):
    config_of(tmp_path, auto_mapping={"unsloth_fixed": True}, peft_version="9.9", lora_dropout=0.1, inference_mode=True)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of tomorrow", ["pissa"]]
)
def test_a_start_that_changes_the_base_is_refused(tmp_path, start):
    assert config_of(tmp_path, init_lora_weights="gaussian")
    with pytest.raises(InputError, match="init_lora_weights"):
        config_of(tmp_path, init_lora_weights=start)


def test_which_modules_are_meant(tmp_path):
    found = config_of(tmp_path, target_modules=["q_proj", "mlp.up_proj"], layers_to_transform=3, exclude_modules=["o_proj"])
    assert found.selects(3, "self_attn.q_proj") and found.selects(3, "mlp.up_proj")
    assert not found.selects(2, "self_attn.q_proj") and not found.selects(3, "mlp.gate_up_proj")
    assert config_of(tmp_path, target_modules="all-linear", layers_to_transform=[]).selects(9, "self_attn.q_proj")
    assert not config_of(tmp_path, target_modules="all-linear", exclude_modules=["q_proj"]).selects(0, "self_attn.q_proj")


@pytest.mark.parametrize(
    "values",
    [{"target_modules": 5}, {"target_modules": [5]}, {"layers_to_transform": "all"}, {"layers_to_transform": [0.5]},
     {"use_rslora": "yes"}, {"r": "4"}, {"r": True}],
)  # fmt: skip
def test_malformed_values(tmp_path, values):
    with pytest.raises(InputError, match="adapter_config"):
        config_of(tmp_path, **values)
