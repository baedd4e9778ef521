"""Command-line options made from the fields of `Config`: each setting is declared once, there.

Every option is taken as text and judged by the config model, so that several mistakes are shown together. Nothing is parsed
or run here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import typer

from lopt_edge.config.settings import Config, field_names
from lopt_edge.errors import InputError
from lopt_edge.plan.methods import owners_of

# Options that several commands have.
ModelOption = Annotated[str, typer.Option("--model", help="model folder, GGUF file or hub id (org/name)")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="hub revision of the model")]
BaseOption = Annotated[
    str | None, typer.Option("--model", help="model folder, GGUF file or hub id (default: what the adapter's config names)")
]
CacheOption = Annotated[str | None, typer.Option("--cache-dir", help="folder of quantised copies")]
TemplateOption = Annotated[str | None, typer.Option("--chat-template", help="Jinja file instead of the tokenizer's")]

MOST_BYTES = 4095  # of a path on Linux
TEXTS = ("--prompt", "--sample-prompt", "--system")


def check_words(words: Sequence[str]) -> None:
    """Refuse a word of the command line that no path, name or number can be; prompts may be of any length.

    Raises InputError.
    """
    for flag, word in zip(("", *words), words, strict=False):
        name, joined, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        if name not in TEXTS and len(os.fsencode(value if joined else word)) > MOST_BYTES:
            where = name if name.startswith("--") else f"{word[:40]}..."
            raise InputError(f"has {len(word):,} letters, more than any path", where=where, fix="check the path")


def config_parameters() -> list[inspect.Parameter]:
    """The options, one for each field of Config; None means not given."""
    parameters = []
    for name in field_names():
        field = Config.model_fields[name]
        flag, default = f"--{name.replace('_', '-')}", field.default
        shown = "" if field.is_required() or default is None or default is False else f" (default: {_shown(default)})"
        text = (field.description or "") + shown
        owners = owners_of(name)
        panel = f"Method {', '.join(owners)}" if owners else None
        how: dict[str, Any] = {"help": text, "show_default": False, "rich_help_panel": panel}
        if field.annotation is bool:
            option: Any = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **how)]
        else:
            option = Annotated[str | None, typer.Option(flag, metavar=_metavar(field.annotation), **how)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))
    return parameters


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(annotation: Any) -> str:
    """The word for an option's value: its choices, or its type."""
    choices = [arg for arg in (annotation, *get_args(annotation)) if get_args(arg) and isinstance(get_args(arg)[0], str)]
    if choices:
        return "|".join(get_args(choices[0]))
    text = str(annotation)
    return "LIST" if "tuple" in text else "FLOAT" if "float" in text else "INTEGER" if "int" in text else "TEXT"


def signature(*own: inspect.Parameter) -> inspect.Signature:
    """The parameters of a command: [CONFIG.yaml], one option for each setting, and the command's own."""
    file = Annotated[str | None, typer.Argument(metavar="[CONFIG.yaml]", help="settings file", show_default=False)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter("config_file", kind, default=None, annotation=file), *config_parameters(), *own]
    )


def own_option(name: str, flag: str, text: str, *, metavar: str | None = None) -> inspect.Parameter:
    """A command's own option: a switch, or with `metavar` a text option."""
    kind: Any = bool if metavar is None else str | None
    annotation = Annotated[kind, typer.Option(flag, help=text, metavar=metavar, show_default=False)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None if metavar else False, annotation=annotation
    )
