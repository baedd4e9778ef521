"""What the documents say is held here: commands and example configs parse, links lead somewhere, what is named exists
(files, tests, ops, laws), and the tables that tools write are theirs."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import lopt_edge
from lopt_edge.cli import main as cli
from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.plan.facts.presets import find_preset
from lopt_edge.plan.methods import METHODS
from lopt_edge.plan.schedule.effects import Kind
from tools.fit_table import cell

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}
README, DESIGN = TEXTS["README.md"], TEXTS["docs/design.md"]
MOST_README_LINES = 150
# A file of the repository as a document names it, maybe with one of its tests.
NAMED_FILE = re.compile(r"(?<![\w/.-])((?:lopt_edge|quant|tests|tools|examples|docs|\.ci)/[\w./*-]*[\w*])")
NAMED_TEST = re.compile(r"\b(test_[a-z0-9_]+)\b(?!\.py|/)")


def blocks(language: str) -> list[str]:
    found = (re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL) for text in TEXTS.values())
    return [block for one in found for block in one]


def commands() -> list[str]:
    lines = [part for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    return [line.partition("  #")[0].strip() for line in lines if line.strip().startswith("lopt-edge")]


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
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
    assert len(commands()) >= 20


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_name_public_things(code):
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
    assert "```sh\npip install -c constraints.txt -e . && lopt-edge finetune examples/quickstart.yaml\n```" in README
    assert "```sh\npip install -c constraints.txt -e '.[test]' && pytest\n```" in README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MOST_README_LINES


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "CHANGELOG.md"])
def test_named_files_and_tests_exist(name):
    text = re.sub(r"\bNAME\b", "*", TEXTS[name])
    for named in NAMED_FILE.findall(text):
        assert any(ROOT.glob(named)), named
    defined = set(re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))))
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(NAMED_TEST.findall(text)) <= defined | files


def numbered(heading: str) -> list[int]:
    """The numbers of the list under a heading of the design."""
    section = re.split(rf"^#+ {heading}.*$", DESIGN, flags=re.MULTILINE)[1]
    return [
        int(number)
        for number in re.findall(r"^(\d+)\. ", re.split(r"^#", section, flags=re.MULTILINE)[0], flags=re.MULTILINE)
    ]


def test_laws_and_rules_that_the_code_cites_are_in_the_design():
    sources = [
        path.read_text() for room in ("lopt_edge", "quant", "tests", "tools") for path in (ROOT / room).rglob("*.py")
    ]
    cited = {int(number) for text in sources for number in re.findall(r"\b[Ll]aw\s+(\d+)", text)}
    assert cited <= set(numbered("Numerics: laws")) == set(range(1, 10))
    validator = (ROOT / "lopt_edge" / "plan" / "schedule" / "validate.py").read_text()
    assert numbered("The rules of a plan") == [
        int(number) for number in re.findall(r"^ \((\d+)\)", validator, flags=re.MULTILINE)
    ]


def test_the_design_names_every_op_and_every_room():
    assert {kind.value for kind in Kind} <= set(re.findall(r"`([A-Z_]+)`", DESIGN))
    layout = {f"{path.parent.name}/" for path in (ROOT / "lopt_edge").rglob("*.py") if path.stem != "__init__"} - {
        "lopt_edge/"
    }
    assert layout <= set(re.findall(r"[\w]+/", DESIGN.split("## Layout")[1].split("## Numerics")[0]))


def test_every_method_has_a_row_and_every_public_name_a_line():
    assert all(f"| `{name}`" in TEXTS["docs/methods.md"] for name in METHODS)
    assert all(f"`{name}" in TEXTS["docs/python.md"] for name in lopt_edge.__all__)


@pytest.mark.parametrize("tool", ["settings_table", pytest.param("fit_table", marks=pytest.mark.long)])
def test_tables_are_those_of_their_tools(tool):
    done = subprocess.run([sys.executable, f"tools/{tool}.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cell_of_the_fit_table_is_what_the_planner_says():
    """One cell, since all of them take most of a minute; `-m long` has all."""
    row = next(line for line in README.splitlines() if line.startswith("| RTX 4090"))
    assert row.split(" | ")[2] == cell("RTX 4090", "llama-3.1-8b")


def test_the_embedded_model_is_small():
    total = sum(path.stat().st_size for path in (ROOT / "examples" / "tiny-llama").iterdir())
    assert total <= 8_000_000


def test_troubleshooting_names_messages_that_the_program_has():
    """What stands between a message's variable parts (...) is in the code, so that whoever searches for it finds it."""
    code = "\n".join(path.read_text() for room in ("lopt_edge", "quant") for path in (ROOT / room).rglob("*.py"))
    code = re.sub(r"[\"']\s*\n\s*f?[\"']", "", code)  # literals over several lines
    code = re.sub(r"\{[^{}]*\}", "...", code)
    cells = re.findall(r"^\| (`.*?) \| [^|]*\|$", TEXTS["docs/troubleshooting.md"], flags=re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    parts = [part.strip(" ;,") for message in messages for part in re.split(r"\.\.\.|->|\bN\b|NAME", message)]
    long = [part for part in parts if len(part) >= 12]
    assert len(long) >= 60
    assert [part for part in long if part not in code] == []
