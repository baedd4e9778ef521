"""`lopt-edge init` and `lopt-edge recipes`: the way to a first settings file.

The rule: what is written is an ordinary settings file with a comment at each choice; it is checked as `finetune` would
check its settings before it is written, and nothing is written over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lopt_edge.cli.terminal import out, say
from lopt_edge.config.load import load_config
from lopt_edge.config.recipes import copy_recipe, recipes, write_new
from lopt_edge.errors import InputError
from lopt_edge.plan.facts.cards import find_card, near_cards
from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.units import format_bytes, parse_bytes

recipes_app = typer.Typer(help="Settings files for usual jobs: list them, copy one.", invoke_without_command=True)
GOALS = {
    "chat": ("learn how to answer, from chats or pairs", {"max_seq_len": "2048", "lr": "2e-4", "epochs": "1"}),
    "short": ("short replies: labels, JSON, titles", {"max_seq_len": "512", "lr": "2e-4", "epochs": "3"}),
    "text": ("learn a field from plain text", {"max_seq_len": "4096", "lr": "1e-4", "lora_r": "64", "lora_alpha": "64"}),
    "memory": ("as little memory as possible", {"max_seq_len": "512", "lr": "2e-4", "method": "lopt"}),
}
WHY = {
    "max_seq_len": "longer rows are cut; lopt-edge data check shows how many",
    "lr": "peak learning rate",
    "epochs": "passes over the data",
    "lora_r": "rank of the adapter: more for knowledge, less for style",
    "lora_alpha": "the adapter is scaled by alpha / r",
    "method": "a gradient boundary: early layers learn a local loss (docs/methods.md)",
}
FREE_OF_A_CARD = 0.92  # of its memory: the screen has the rest


@recipes_app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes; `lopt-edge recipes cp NAME` copies one."""
    if context.invoked_subcommand is not None:
        return
    table = Table(title="lopt-edge recipes cp NAME copies one", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is for")
    for recipe in recipes():
        table.add_row(recipe.name, recipe.what)
    out.print(table, soft_wrap=False)


@recipes_app.command("cp")
def copy(
    name: Annotated[str, typer.Argument(help="of the recipe")],
    target: Annotated[str | None, typer.Argument(metavar="[FILE.yaml]", help="where to (default: NAME.yaml)")] = None,
) -> None:
    """Copy a recipe."""
    path = copy_recipe(name, None if target is None else Path(target))
    out.print(f"{path}: now lopt-edge plan {path}, lopt-edge finetune {path}", markup=False)


def init(
    file: Annotated[str, typer.Argument(metavar="[FILE.yaml]", help="settings file to write")] = "run.yaml",
    model: Annotated[str | None, typer.Option("--model", help="model folder, or hub id (asked otherwise)")] = None,
    data: Annotated[str | None, typer.Option("--data", help="file, folder or hub data set (asked otherwise)")] = None,
    memory: Annotated[str | None, typer.Option("--on", help="card, or amount of memory (asked otherwise)")] = None,
    goal: Annotated[str | None, typer.Option("--goal", help=f"{', '.join(GOALS)} (asked otherwise)")] = None,
) -> None:
    """Ask four questions and write a settings file with comments."""
    if Path(file).exists():
        raise InputError("exists already", where=file, fix="name another file")
    model = model or _ask("Which model? A folder or a hub id", "Qwen/Qwen2.5-0.5B-Instruct")
    data = data or _ask("Which data? A file, a folder or a hub data set", "my-data.jsonl")
    memory = memory or _ask("Which card or how much memory? rtx4060, 8GB, or cpu 4GB", "cpu 4GB")
    if goal is None:
        for name, (what, _) in GOALS.items():
            say(f"  {name}: {what}")
        goal = _ask("What for?", "chat")
    if goal not in GOALS:
        raise InputError(f"{goal!r} is unknown", where="--goal", fix=f"choose from {', '.join(GOALS)}")
    text = settings_file(model, data, memory, goal, output=f"outputs/{Path(file).stem}")
    write_new(Path(file), text)
    out.print(f"{file}: now lopt-edge plan {file}, lopt-edge finetune {file}", markup=False)


def settings_file(model: str, data: str, memory: str, goal: str, *, output: str) -> str:
    """The text of a settings file, each choice with its reason. Raises InputError(s) for what finetune would refuse."""
    values: dict[str, tuple[str, str]] = {
        "model": (model, "a folder, or a hub id"),
        "data": (data, "lopt-edge data check shows what is learned of it"),
        "output": (output, "adapter, logs, report.html, checkpoints"),
        **_where(memory),
        "batch_size": ("1", "sequences at a time"),
        "grad_accum": ("8", "times so many before an update"),
        **{name: (value, WHY[name]) for name, value in GOALS[goal][1].items()},
        "eval_fraction": ("0.05", "held out, to see whether it learns"),
    }
    load_config(None, {name: value for name, (value, _) in values.items()})
    lines = [f"# {GOALS[goal][0]}: lopt-edge plan says what it will take, lopt-edge finetune runs it"]
    width = max(len(f"{name}: {_scalar(value)}") for name, (value, _) in values.items())
    lines += [f"{f'{name}: {_scalar(value)}':<{width}}  # {why}" for name, (value, why) in values.items()]
    return "\n".join(lines) + "\n"


def _where(memory: str) -> dict[str, tuple[str, str]]:
    """The device and its budget: of a card, of `cpu 4GB`, or of an amount."""
    words = memory.split()
    on_cpu = words[:1] == [CPU.name]
    amount = " ".join(words[1:] if on_cpu else words)
    device = {"device": (CPU.name, "where to compute")} if on_cpu else {}
    if not amount:
        return device
    if (card := find_card(amount)) is not None and not on_cpu:
        budget = f"{card.memory_bytes * FREE_OF_A_CARD / 2**30:.1f}GiB"
        return {
            "device_memory": (budget, f"of the {format_bytes(card.memory_bytes)} of a {card.name}; the screen has the rest")
        }
    try:
        parse_bytes(amount, free_bytes=2**40, where="--on")
    except InputError as error:
        near = near_cards(amount)
        raise InputError(error.what, where="--on", fix=f"did you mean {', '.join(near)}?" if near else error.fix) from None
    return {**device, "device_memory": (amount, "what the run may take, libraries included")}


def _scalar(value: str) -> str:
    """A value as YAML reads it back: quoted where it would be something else."""
    plain = value.replace("-", "").replace("_", "").replace("/", "").replace(".", "").replace("~", "")
    return value if plain.isalnum() else f"'{value.replace(chr(39), chr(39) * 2)}'"


def _ask(question: str, default: str) -> str:
    answer: str = typer.prompt(question, default=default, err=True)
    return answer.strip() or default
