"""`lopt-edge eval`: a model or an adapter on a data file, as loss, perplexity and exact matches.

The rule: what is printed stands in the JSON form, too; with an adapter the base is measured beside it, so that the figure
means something. Nothing is written.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from lopt_edge.cli.options import BaseOption, CacheOption, DeviceOption, DtypeOption, RevisionOption
from lopt_edge.cli.terminal import out, warn
from lopt_edge.errors import InputError


def evaluate(
    adapter: Annotated[str | None, typer.Argument(metavar="[OUTPUT]", help="output folder of a run, or an adapter")] = None,
    data: Annotated[str, typer.Option("--data", help="what to score: file, folder or hub data set")] = "",
    model: BaseOption = None,
    exact_match: Annotated[int, typer.Option("--exact-match", help="compare greedy completions of the first N rows")] = 0,
    with_base: Annotated[bool, typer.Option("--base/--no-base", help="measure the base beside an adapter")] = True,
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", help="longest sequence in tokens")] = None,
    revision: RevisionOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = "auto",
    compute_dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Score a model, with or without an adapter, on a data file: loss, perplexity, exact matches."""
    if not data:
        raise InputError("is needed", where="--data", fix="name the file to score")
    if adapter is None and model is None:
        raise InputError("is needed", where="--model", fix="name a model, or a run's output folder")
    if exact_match < 0:
        raise InputError("must be 0 or more", where="--exact-match", fix="give a number of rows")
    loading: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "device": device, "say": warn}
    loading["compute_dtype"] = compute_dtype
    how: dict[str, Any] = {"data": data, "n_matches": exact_match, "max_seq_len": max_seq_len}
    rows = {"adapter" if adapter else "model": _scored(model, adapter, loading, **how)}
    if adapter is not None and with_base:
        from lopt_edge.adapters.base import base_of

        source = base_of(adapter, model=model, revision=revision, say=lambda text: None)
        rows = {"base": _scored(str(source.path), None, loading, **how), **rows}
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        out.print(_table(rows), soft_wrap=False)


def _scored(
    model: str | None,
    adapter: str | None,
    loading: dict[str, Any],
    *,
    data: str,
    n_matches: int,
    max_seq_len: int | None,
) -> dict[str, Any]:
    from lopt_edge.adapters.generation import load_generator
    from lopt_edge.adapters.perplexity import read_for, score
    from lopt_edge.comparison.exact_match import matches_of, questions

    asked = questions(data, n_matches, None) if n_matches else []
    generator = load_generator(model, adapter, **loading)
    found = score(generator, read_for(generator, data, max_seq_len=max_seq_len))
    values = {**asdict(found), "perplexity": found.perplexity}
    return {**values, **({"asked": len(asked), "matches": matches_of(generator, asked)} if asked else {})}


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
