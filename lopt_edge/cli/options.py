"""Command-line options made from the fields of `Config`: each setting is declared once, there.

Every option is taken as text and judged by the config model, so that several mistakes are shown together. Nothing is parsed
or run here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import typer

from lopt_edge.config.aliases import ADVICE, ALIASES
from lopt_edge.config.panels import BASICS, in_panels
from lopt_edge.config.settings import Config, may_be_bool
from lopt_edge.errors import InputError, raise_collected
from lopt_edge.plan.facts.device_kinds import AUTO, DEVICE_TYPES, in_words

# Options that several commands have.
ModelOption = Annotated[str, typer.Option("--model", help="model folder, GGUF file or hub id (org/name)")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="hub revision of the model")]
BaseOption = Annotated[
    str | None, typer.Option("--model", help="model folder, GGUF file or hub id (default: what the adapter's config names)")
]
CacheOption = Annotated[str | None, typer.Option("--cache-dir", help="folder of quantised copies")]
DeviceOption = Annotated[str, typer.Option("--device", help=in_words(AUTO, *DEVICE_TYPES))]
DtypeOption = Annotated[str, typer.Option("--compute-dtype", help="auto, float32, bfloat16 or float16")]
TemplateOption = Annotated[str | None, typer.Option("--chat-template", help="Jinja file instead of the tokenizer's")]

WIDEST_WORD = 20  # letters of choices beside a flag; more of them stand in its help text
MOST_BYTES = 4095  # of a path on Linux
WITH_SETTINGS = ("finetune", "plan", "resume")  # the commands that take the settings of a run as flags
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


def in_our_words(words: Sequence[str]) -> list[str]:
    """The words of the command line with other tools' flags in the place where ours are meant.

    Raises InputErrors for those that mean nothing here, and for two names of one setting.
    """
    if not words or words[0] not in WITH_SETTINGS:
        return list(words)
    found, errors, given = list[str](), list[InputError](), dict[str, str]()
    for before, word in zip(("", *words), words, strict=False):
        flag, joined, value = word.partition("=")
        name = flag[2:].replace("-", "_") if word.startswith("--") and before not in TEXTS else ""
        ours = ALIASES.get(name, name)
        if name in ADVICE:
            errors.append(InputError("is another tool's flag", where=flag, fix=ADVICE[name]))
        elif ours and given.setdefault(ours, flag) != flag:
            errors.append(InputError(f"means the same as {given[ours]}", where=flag, fix="keep one of them"))
        found.append(f"--{ours.replace('_', '-')}{joined}{value}" if ours != name else word)
    raise_collected(errors)
    return found


def config_parameters() -> list[inspect.Parameter]:
    """The options, one for each field of Config, in the order of their panels; None means not given.

    The basics stand in the first panel that the help has, beside the command's own options.
    """
    parameters = []
    for panel, names in in_panels():
        for name in names:
            field = Config.model_fields[name]
            flag, default = f"--{name.replace('_', '-')}", field.default
            shown = "" if field.is_required() or default is None or default is False else f" (default: {_shown(default)})"
            word, choices = _metavar(field.annotation)
            text = f"{field.description or ''}{choices}{shown}"
            how: dict[str, Any] = {"help": text, "show_default": False}
            how["rich_help_panel"] = None if panel == BASICS else panel
            if may_be_bool(field.annotation):
                parameters.append(_optional(name, bool, typer.Option(flag, metavar="", **how)))
                parameters.append(_optional(f"no_{name}", bool, typer.Option(f"--no-{flag[2:]}", hidden=True)))
            else:
                parameters.append(_optional(name, str, typer.Option(flag, metavar=word, **how)))
    return parameters


def _optional(name: str, kind: type, option: Any) -> inspect.Parameter:
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def settings_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a command's flags give; `--no-x` gives x as false. Raises InputError for `--x --no-x`."""
    found = {name: value for name, value in flags.items() if value is not None}
    for name in [name for name in found if name.startswith("no_") and name not in Config.model_fields]:
        setting, flag = name[3:], name.replace("_", "-")
        if found.pop(name) and found.setdefault(setting, False):
            raise InputError(f"contradicts --{flag[3:]}", where=f"--{flag}", fix="keep one of them")
    return found


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(annotation: Any) -> tuple[str, str]:
    """(the word for an option's value, its choices for the help text where they are too many for a word)."""
    choices = [arg for arg in (annotation, *get_args(annotation)) if get_args(arg) and isinstance(get_args(arg)[0], str)]
    if choices:
        joined = "|".join(get_args(choices[0]))
        return (joined, "") if len(joined) <= WIDEST_WORD else ("NAME", f": {', '.join(get_args(choices[0]))}")
    text = str(annotation)
    return ("LIST" if "tuple" in text else "FLOAT" if "float" in text else "INTEGER" if "int" in text else "TEXT"), ""


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
    annotation = Annotated[kind, typer.Option(flag, help=text, metavar=metavar or "", show_default=False)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None if metavar else False, annotation=annotation
    )
