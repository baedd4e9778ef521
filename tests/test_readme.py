"""The README's commands and every example config are parsed here, so that they stay true."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from lopt_edge.cli import main as cli
from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.plan.facts.presets import find_preset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [part for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    return [line.partition("  #")[0].strip() for line in lines if line.strip().startswith("lopt-edge")]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, monkeypatch):
    """Each command names a subcommand and options that exist, with every needed one; nothing is run."""
    words = shlex.split(command)[1:]
    current: object = get_command(cli.app)
    while hasattr(current, "commands"):
        assert words[0] in current.commands, words[0]
        current = current.commands[words.pop(0)]
    context = current.make_context("lopt-edge", words)
    assert isinstance(context, typer.Context) or context.params is not None
    if command.startswith("lopt-edge finetune"):
        flags = {key: value for key, value in context.params.items() if key in Config.model_fields}
        monkeypatch.chdir(ROOT)
        assert load_config(context.params.get("config_file"), flags)


def test_there_are_commands_to_test():
    assert len(commands()) >= 7


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_name_public_things(code):
    import lopt_edge

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "lopt_edge":
            for name in node.names:
                assert getattr(lopt_edge, name.name)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Config":
            assert {keyword.arg for keyword in node.keywords} <= set(Config.model_fields)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_configs_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    for name in (config.model, config.data, config.eval_data, config.retention_data):
        assert name is None or Path(name).exists() or name == "my-data.jsonl" or find_preset(name)


def test_set_up_commands_are_there():
    assert "pip install -c constraints.txt -e . && lopt-edge finetune examples/quickstart.yaml" in README
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in README


def test_the_embedded_model_is_small():
    total = sum(path.stat().st_size for path in (ROOT / "examples" / "tiny-llama").iterdir())
    assert total <= 8_000_000
