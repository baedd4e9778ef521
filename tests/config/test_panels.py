"""Groups of settings, other tools' names for them, and the schema: made from the same fields, and complete."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import yaml

from lopt_edge.cli.options import in_our_words, settings_of
from lopt_edge.config.aliases import ADVICE, ALIASES
from lopt_edge.config.load import load_config
from lopt_edge.config.panels import BASICS, METHODS_PANEL, OTHERS, in_panels
from lopt_edge.config.schema import schema
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError

ROOT = Path(__file__).parents[2]
NEEDED = {"model": "m", "data": "d", "output": "o"}


def test_every_setting_stands_in_one_panel_basics_first_and_methods_last():
    panels = in_panels()
    names = [name for _, names in panels for name in names]
    assert sorted(names) == sorted(Config.model_fields) and len(names) == len(set(names))
    headings = [panel for panel, _ in panels]
    assert headings[0] == BASICS and OTHERS not in headings
    after = headings[headings.index(METHODS_PANEL) + 1 :]
    assert after and all(panel.startswith("Method ") for panel in after)


def test_other_names_are_none_of_ours_and_mean_something_here():
    assert not {*ALIASES, *ADVICE} & Config.model_fields.keys()
    assert set(ALIASES.values()) <= Config.model_fields.keys()
    assert not ALIASES.keys() & ADVICE.keys()


def test_other_tools_keys_are_read_and_refused_with_advice(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\ndata: d\noutput_dir: o\nlearning_rate: 1e-3\nlora-rank: 4\n")
    config = load_config(path)
    assert (config.model, config.lr, config.lora_r) == ("m", 1e-3, 4)
    path.write_text(
        "model: m\ndata: d\noutput: o\nlr: 1\nlearning_rate: 2\nload_in_4bit: true\nlora_rnk: 3\nlora_rank: no\n"
    )
    with pytest.raises(InputError) as error:
        load_config(path)
    told = str(error.value)
    assert f"{path}:5: learning_rate: means the same as lr in line 4" in told
    assert f"{path}:6: load_in_4bit: is another tool's setting" in told and "always in 4 bits" in told
    assert "did you mean 'lora_r'?" in told and f"{path}:8: lora_r" in told


def test_other_tools_flags_become_ours():
    words = ["finetune", "--learning-rate=1e-3", "--lora_rank", "4", "--sample-prompt", "--learning-rate", "--dry-run"]
    ours = ["finetune", "--lr=1e-3", "--lora-r", "4", "--sample-prompt", "--learning-rate", "--dry-run"]
    assert in_our_words(words) == ours
    assert in_our_words(["generate", "--iters", "4"]) == ["generate", "--iters", "4"]
    with pytest.raises(InputError) as error:
        in_our_words(["finetune", "--train", "--lr", "1", "--learning-rate", "2"])
    assert "--train: is another tool's flag" in str(error.value) and "means the same as --lr" in str(error.value)


def test_a_switch_has_a_no_form():
    assert settings_of({"force": True, "no_dry_run": True, "no_force": None}) == {"force": True, "dry_run": False}
    with pytest.raises(InputError, match="--no-force: contradicts --force"):
        settings_of({"force": True, "no_force": True})


def test_the_schema_is_that_of_the_examples_and_knows_every_setting():
    found = schema()
    assert json.loads((ROOT / "examples" / "config.schema.json").read_text()) == found
    assert set(found["properties"]) == set(Config.model_fields)
    for path in (ROOT / "examples").glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# yaml-language-server: $schema=config.schema.json\n")
        assert set(yaml.safe_load(text)) <= found["properties"].keys()
    assert {"type": "string"} in found["properties"]["lora_targets"]["anyOf"]
    assert found["properties"]["lr"]["exclusiveMinimum"] == 0


def test_the_help_shows_the_basics_beside_the_commands_own_options(command):
    from lopt_edge.cli.main import finetune_command

    options = {name: parameter.annotation for name, parameter in inspect.signature(finetune_command).parameters.items()}
    assert options["model"].__metadata__[0].rich_help_panel is None
    assert options["method"].__metadata__[0].rich_help_panel == METHODS_PANEL
    code, out, _ = command("finetune", "--help")
    lines = [line for line in out.splitlines() if line.startswith("╭")]
    assert code == 0 and "--no-dry-run" not in out
    assert [line.split("─")[1].strip() for line in lines[1:4]] == ["Options", "Training", "LoRA"]
