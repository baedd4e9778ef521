"""`lopt-edge data check`: a data file as training will see it, with what is used, left out and peculiar about it.

The rule: it refuses what `finetune` would refuse of the data, the template and the sequence length, and nothing else.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lopt_edge.cli.options import ModelOption, RevisionOption, TemplateOption
from lopt_edge.cli.terminal import out, warn
from lopt_edge.config.load import file_errors
from lopt_edge.errors import InputError, raise_collected

LONGEST = 2048  # tokens, where the user does not say


def data_check(
    file: Annotated[str, typer.Argument(help="data file, folder, or hub data set (org/name); several with commas")],
    model: ModelOption,
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", help="longest sequence in tokens")] = None,
    data_format: Annotated[str | None, typer.Option("--data-format", help="form of the rows (default: detected)")] = None,
    ignore_columns: Annotated[str, typer.Option("--ignore-columns", help="fields to leave out, e.g. chosen,notes")] = "",
    columns: Annotated[str, typer.Option("--columns", help="our field names, e.g. prompt=question,completion=answer")] = "",
    objective: Annotated[
        str | None, typer.Option("--objective", help="as the run's: sft, dpo, orpo, simpo, kto (default: as the rows are)")
    ] = None,
    chat_template: TemplateOption = None,
    think: Annotated[str | None, typer.Option("--think", help="thoughts: keep, strip or last")] = None,
    escape_special_tokens: Annotated[
        bool, typer.Option("--escape-special-tokens", help="encode control tokens typed in the data as plain text")
    ] = False,
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Show the first rendered examples with the supervised tokens marked, and what is truncated, dropped or left out."""
    from lopt_edge.data import DATA_FORMATS, check_facts, check_report, load_dataset
    from lopt_edge.data.thoughts import THINK
    from lopt_edge.models.folder import find_model
    from lopt_edge.models.tokenizer import load_tokenizer
    from lopt_edge.planning.settings import longest_sequence

    for flag, given, choices in (("--data-format", data_format, DATA_FORMATS), ("--think", think, THINK)):
        if given not in (None, *choices):
            raise InputError(f"{given!r} is unknown", where=flag, fix=f"choose from {', '.join(choices)}")
    if max_seq_len is not None and max_seq_len < 2:
        raise InputError(f"{max_seq_len} is too short", where="--max-seq-len", fix="use 2 or more")
    raise_collected(file_errors({"chat_template": chat_template}))
    found = find_model(model, revision=revision, lay_out=False)
    longest = longest_sequence(found.facts, max_seq_len or LONGEST, is_given=max_seq_len is not None)
    tokenizer = load_tokenizer(found.path, say=warn)
    how: dict[str, Any] = {"data_format": data_format, "chat_template": chat_template, "think": think}
    how["columns"] = _names(columns)
    how |= {"escape_special_tokens": escape_special_tokens, "ignore_columns": _names(ignore_columns)}
    how["preferences"] = _asked_by(objective)
    dataset = load_dataset(file, tokenizer, max_seq_len=longest, **how)
    if as_json:
        print(json.dumps(check_facts(dataset), indent=2))
    else:
        out.print(check_report(dataset, tokenizer), soft_wrap=False)  # else it would be cut at the terminal's width


def _asked_by(objective: str | None) -> str:
    """The form of preferences that an objective asks of the rows. Raises InputError for an unknown one."""
    from lopt_edge.objectives import OBJECTIVES

    forms = {"sft": "none", **{name: one.form for name, one in OBJECTIVES.items()}}
    if objective not in (None, *forms):
        raise InputError(f"{objective!r} is unknown", where="--objective", fix=f"choose from {', '.join(forms)}")
    return "as they are" if objective is None else forms[objective]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
