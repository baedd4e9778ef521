"""`lopt-edge eval`: a model or an adapter on a data file, as loss, perplexity and exact matches, or on the tasks of
lm-evaluation-harness.

The rule: what is printed stands in the JSON form, too; with an adapter the base is measured beside it, so that the figure
means something. Nothing is written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lopt_edge.adapters.harness import Asked, figures_of, manager_of, run_tasks
from lopt_edge.cli.options import BaseOption, CacheOption, DeviceOption, DtypeOption, RevisionOption
from lopt_edge.cli.terminal import out, warn
from lopt_edge.config.load import load_config
from lopt_edge.errors import InputError, raise_collected


def evaluate(
    adapter: Annotated[str | None, typer.Argument(metavar="[OUTPUT]", help="output folder of a run, or an adapter")] = None,
    data: Annotated[str, typer.Option("--data", help="what to score: file, folder or hub data set")] = "",
    model: BaseOption = None,
    exact_match: Annotated[int, typer.Option("--exact-match", help="compare greedy completions of the first N rows")] = 0,
    tasks: Annotated[str, typer.Option("--tasks", help="tasks of lm-evaluation-harness, by name: a,b")] = "",
    task_folder: Annotated[str | None, typer.Option("--task-folder", help="--tasks: a folder with more of them")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="--tasks: the first rows of each alone")] = None,
    few_shot: Annotated[int | None, typer.Option("--few-shot", help="--tasks: examples before each question")] = None,
    as_chat: Annotated[bool, typer.Option("--as-chat", help="--tasks: questions in the chat template")] = False,
    with_base: Annotated[bool, typer.Option("--base/--no-base", help="measure the base beside an adapter")] = True,
    columns: Annotated[
        str, typer.Option("--columns", help="our field names, e.g. prompt=question (default: as the run had, if they fit)")
    ] = "",
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", help="longest sequence in tokens")] = None,
    revision: RevisionOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = "auto",
    compute_dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Score a model, with or without an adapter, on a data file (loss, perplexity, exact matches) or on tasks."""
    asked = Asked(_names(tasks), task_folder, limit, few_shot, as_chat)
    _check(data, adapter or model, exact_match, asked)
    manager = manager_of(asked) if asked.tasks else None
    loading: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "device": device, "say": warn}
    loading["compute_dtype"] = compute_dtype
    how = Measured(data, exact_match, max_seq_len, asked, manager, _columns(columns, adapter, data))
    rows = {"adapter" if adapter else "model": _scored(model, adapter, loading, how)}
    if adapter is not None and with_base:
        from lopt_edge.adapters.base import base_of

        source = base_of(adapter, model=model, revision=revision, say=lambda text: None)
        rows = {"base": _scored(str(source.path), None, loading, how), **rows}
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if data:
        out.print(_table(rows), soft_wrap=False)
    if asked.tasks:
        out.print(_task_table({name: row["tasks"] for name, row in rows.items()}), soft_wrap=False)


@dataclass(frozen=True)
class Measured:
    """What is measured of each model: a data file, exact matches on its first rows, tasks; `columns`: ours=theirs."""

    data: str
    n_matches: int
    max_seq_len: int | None
    asked: Asked
    manager: Any
    columns: tuple[str, ...]


def _names(tasks: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in tasks.split(",") if name.strip())


def _columns(given: str, adapter: str | None, data: str) -> tuple[str, ...]:
    """The names of the data's fields: as given, else as the run of this adapter had them, if the first row has them all."""
    if given and not data:
        raise InputError("has no effect without --data", where="--columns", fix="leave it out")
    if given or not data or adapter is None:
        return _names(given)
    from lopt_edge.data.renamed import mapping_of
    from lopt_edge.data.sources import sources_of

    run = Path(adapter) / "config.yaml"
    had = (load_config(run).columns if run.is_file() else None) or ()
    first = next((record.value for record in sources_of(data)[0].records()), None) if had else None
    if not isinstance(first, dict) or not mapping_of(had).keys() <= first.keys():
        return ()
    warn(f"columns as in the run: {', '.join(had)}")
    return tuple(had)


def _check(data: str, named: str | None, exact_match: int, asked: Asked) -> None:
    """Refuse a command that asks for nothing, or gives what has no effect. Raises InputError(s)."""
    errors = []
    if not data and not asked.tasks:
        errors.append(InputError("is needed", where="--data", fix="name the file to score, or tasks with --tasks"))
    if named is None:
        errors.append(InputError("is needed", where="--model", fix="name a model, or a run's output folder"))
    if exact_match < 0:
        errors.append(InputError("must be 0 or more", where="--exact-match", fix="give a number of rows"))
    if exact_match and not data and asked.tasks:
        errors.append(InputError("has no effect without --data", where="--exact-match", fix="leave it out"))
    given = {"--task-folder": asked.folder, "--limit": asked.limit, "--few-shot": asked.few_shot}
    for option in [name for name, value in given.items() if value is not None] + ["--as-chat"] * asked.as_chat:
        if not asked.tasks:
            errors.append(InputError("has no effect without --tasks", where=option, fix="leave it out"))
    for option, value, least in (("--limit", asked.limit, 1), ("--few-shot", asked.few_shot, 0)):
        if value is not None and value < least:
            errors.append(InputError(f"must be {least} or more", where=option, fix="give another number"))
    raise_collected(errors)


def _scored(model: str | None, adapter: str | None, loading: dict[str, Any], how: Measured) -> dict[str, Any]:
    from lopt_edge.adapters.generation import load_generator
    from lopt_edge.adapters.perplexity import read_for, score
    from lopt_edge.comparison.exact_match import matches_of, questions

    asked = questions(how.data, how.n_matches, None, columns=how.columns) if how.n_matches else []
    generator, values = load_generator(model, adapter, **loading), dict[str, Any]()
    if how.data:
        found = score(generator, read_for(generator, how.data, max_seq_len=how.max_seq_len, columns=how.columns))
        values |= {**asdict(found), "perplexity": found.perplexity}
    if asked:
        values |= {"asked": len(asked), "matches": matches_of(generator, asked)}
    if how.asked.tasks:
        values["tasks"] = run_tasks(generator, how.asked, how.manager, max_seq_len=how.max_seq_len)
    return values


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title_justify="left")
    matched = any("matches" in row for row in rows.values())
    for heading in ("", "loss", "perplexity", "tokens", "rows", "cut", "dropped", *(["exact match"] if matched else [])):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        cells = [name, f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}", f"{row['n_tokens']:,}", f"{row['n_rows']:,}"]
        cells += [f"{row['n_truncated']:,}", f"{row['n_dropped']:,}"]
        cells += [f"{row['matches']} of {row['asked']}"] if matched else []
        table.add_row(*cells)
    return table


def _task_table(rows: dict[str, dict[str, Any]]) -> Table:
    """The figures of each task and metric, a column for each model, each with its standard error where it has one."""
    table = Table(title_justify="left")
    for heading in ("task", "metric", *rows):
        table.add_column(heading, justify="right" if heading in rows else "left")
    for task, name in figures_of(list(rows.values())):
        metric, comma, kind = name.partition(",")
        cells = []
        for row in rows.values():
            value, error = row[task].get(name), row[task].get(f"{metric}_stderr{comma}{kind}")
            cells.append("" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
        table.add_row(task, name, *cells)
    return table
