"""A comparison as Markdown (one row a variant), as CSV (the same, numbers in full) and as JSON (every run).

Order is the user's; nothing is set in bold and no row is called the best: the spread stands beside each mean, and runs that
are missing stand under the table with their reasons. Columns that hold nothing are left out of the Markdown, not of the
other two.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopt_edge.comparison.figures import FIGURES, Outcome, Row, shown_figures
from lopt_edge.comparison.paired import differences, paired_table
from lopt_edge.errors import RunError
from quant.headers import FolderError, read_json

Table = list[list[str]]  # the first line is the heading
JSON_NAME = "compare.json"  # written first: it says whose the others are
TABLES = (JSON_NAME, "compare.md", "compare.csv", "compare.html")


def main_table(rows: Sequence[Row]) -> Table:
    """The table of figures, one row a variant."""
    figures = shown_figures(rows)
    table = [["variant", "lr", "runs", *(figure.heading for figure in figures.values())]]
    for row in rows:
        runs = f"{row.n_done} of {len(row.outcomes)}" if row.outcomes else "0"
        status = "" if row.status == "done" else f", {row.status}"
        lr = "-" if row.lr is None else f"{row.lr:g}"
        table.append([row.name, lr, f"{runs}{status}", *(row.spread(name).text(one) for name, one in figures.items())])
    return table


def tuning_table(rows: Sequence[Row]) -> Table:
    """The held-out loss of each variant at each learning rate of the grid; empty without one."""
    tuned = [row for row in rows if row.tuning]
    if not tuned:
        return []
    table = [["variant", *(f"lr {outcome.cell.lr:g}" for outcome in tuned[0].tuning), "taken"]]
    for row in tuned:
        losses = [
            ("failed" if outcome.failed else "not run") if outcome.eval_loss is None else f"{outcome.eval_loss:.4f}"
            for outcome in row.tuning
        ]
        table.append([row.name, *losses, "-" if row.lr is None else f"{row.lr:g}"])
    return table


def settings_lines(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings as pairs of name and text."""
    for key, value in settings.items():
        yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def as_markdown(rows: Sequence[Row], settings: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The comparison as Markdown: figures, remarks, learning rates, missing runs, shared settings."""
    parts = ["# Comparison", "", *_markdown_table(main_table(rows)), "", *(f"- {_cell(remark)}" for remark in remarks)]
    if paired := paired_table(rows):
        parts += ["", "## Differences, paired by seed", "", *_markdown_table(paired)]
    if tuning := tuning_table(rows):
        parts += ["", "## Learning rates: held-out loss of the first seed", "", *_markdown_table(tuning)]
    if problems := [problem for row in rows for problem in row.problems]:
        parts += ["", "## Runs that are not there", "", *(f"- {_cell(problem)}" for problem in problems)]
    parts += ["", "## What all share", "", *(f"- {key}: {_cell(value)}" for key, value in settings_lines(settings))]
    return "\n".join(parts) + "\n"


def _markdown_table(table: Table) -> Iterator[str]:
    heading, *body = [[_cell(text) for text in line] for line in table]
    yield f"| {' | '.join(heading)} |"
    yield f"|{'|'.join(['---', *['---:'] * (len(heading) - 1)])}|"
    yield from (f"| {' | '.join(line)} |" for line in body)


def _cell(text: str) -> str:
    """The text on one line, without what Markdown would take for a column's end or a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def as_csv(rows: Sequence[Row]) -> str:
    """The comparison as CSV: every figure of each variant, numbers in full."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [column for name in FIGURES for column in (name, f"{name}_std")]
    writer.writerow(["variant", "lr", "status", "runs", "runs_done", *columns, "problems"])
    for row in rows:
        spreads = [row.spread(name) for name in FIGURES]
        values = [value for spread in spreads for value in (spread.mean, spread.std)]
        writer.writerow([row.name, row.lr, row.status, len(row.outcomes), row.n_done, *values, "; ".join(row.problems)])
    return file.getvalue()


def as_json(rows: Sequence[Row], settings: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The comparison as JSON: every run of each variant."""
    paired = {name: {figure: asdict(one) for figure, one in found.items()} for name, found in differences(rows).items()}
    values = {"shared": dict(settings), "remarks": list(remarks), "variants": [_row_values(row) for row in rows],
              "differences": paired}  # fmt: skip
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _row_values(row: Row) -> dict[str, Any]:
    spreads = {name: row.spread(name) for name in FIGURES}
    return {
        "variant": row.name,
        "lr": row.lr,
        "status": row.status,
        "figures": {name: {"mean": one.mean, "std": one.std, "n": len(one.values)} for name, one in spreads.items()},
        "runs": [_outcome_values(outcome) for outcome in row.outcomes],
        "tuning": [_outcome_values(outcome) for outcome in row.tuning],
        "problems": row.problems,
    }


def _outcome_values(outcome: Outcome) -> dict[str, Any]:
    figures = None if outcome.figures is None else dict(outcome.figures)
    return {
        "seed": outcome.cell.seed,
        "lr": outcome.cell.lr,
        "folder": str(outcome.cell.folder),
        "figures": figures,
        "facts": dict(outcome.facts),
        "reason": outcome.reason,
    }


def is_ours(folder: Path) -> bool:
    """Whether the tables in a folder are of a comparison."""
    try:
        found = read_json(folder / JSON_NAME)
    except FolderError:
        return False
    return isinstance(found, dict) and {"shared", "remarks", "variants"} <= set(found)


def write(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a reader sees the old or the new one. Raises RunError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="free space or permissions") from None
