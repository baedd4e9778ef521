"""Recipes and `init`: each is planned and dry-run; what they write is what `finetune` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lopt_edge import finetune
from lopt_edge.config.load import load_config
from lopt_edge.config.recipes import FOLDER, recipes
from lopt_edge.planning.worst_case import NOT_GIVEN, question

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
RECIPES = {recipe.name: recipe for recipe in recipes()}
ROW = {"messages": [{"role": "user", "content": "f(x)"}, {"role": "assistant", "content": "Return x."}]}
PAIR = {"prompt": "f(x)", "chosen": " Return x.", "rejected": " Return y."}
LOCAL = ("model", "data", "device", "device_memory", "host_memory", "disk_memory", "max_seq_len")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for name, row in (("rows", ROW), ("pairs", PAIR)):
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 40)
    return str(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_fits_where_it_says_and_starts(name, data, tmp_path):
    """Its own plan line names a preset and a card: there it fits, within its budgets. And it is dry-run on a tiny model."""
    line = next(line for line in RECIPES[name].text.splitlines() if "lopt-edge plan" in line)
    preset = line.split("--model ")[1].split()[0]
    card = line.partition("--gpu ")[2].strip(' "') or None
    config = load_config(FOLDER / f"{name}.yaml", {"model": preset, "data": NOT_GIVEN})
    asked = question(config, gpu=card)
    assert asked.search.within(asked.budget).best is not None
    given = load_config(FOLDER / f"{name}.yaml").model_dump(exclude_unset=True)
    settings = {key: value for key, value in given.items() if key not in LOCAL}
    rows = f"{data}/{'pairs' if 'objective' in settings else 'rows'}.jsonl"
    own = {"model": str(TINY), "data": rows, "output": str(tmp_path / "out"), "device": "cpu", "dry_run": True}
    assert finetune(load_config(None, {**settings, **own})) is None


def test_there_are_a_dozen_and_one_is_copied(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("recipes")
    assert code == 0 and len(RECIPES) >= 12 and all(name in out for name in RECIPES)
    assert command("recipes", "cp", "chat-8gb")[0] == 0
    assert Path("chat-8gb.yaml").read_text() == RECIPES["chat-8gb"].text
    code, _, err = command("recipes", "cp", "chat-8gb")
    assert code == 2 and "exists already" in err
    code, _, err = command("recipes", "cp", "chat-9gb")
    assert code == 2 and "did you mean chat-8gb" in err


def test_init_writes_what_finetune_reads(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = iter(["org/name", "a: b.jsonl", "rtx4090", "text"])
    monkeypatch.setattr("typer.prompt", lambda question, default, err: next(answers))
    assert command("init")[0] == 0
    config = load_config("run.yaml")
    assert (config.model, config.data, config.lora_r, config.output) == ("org/name", "a: b.jsonl", 64, "outputs/run")
    assert config.device_memory == "21.7GiB" and "# rank of the adapter" in Path("run.yaml").read_text()
    words = ("--model", "m/n", "--data", "d.jsonl", "--goal", "chat")
    assert command("init", "cpu.yaml", *words, "--on", "cpu 4GB")[0] == 0
    assert (load_config("cpu.yaml").device, load_config("cpu.yaml").device_memory) == ("cpu", "4GB")
    code, _, err = command("init", "x.yaml", *words, "--on", "rtx4091")
    assert code == 2 and "did you mean" in err and not Path("x.yaml").exists()
