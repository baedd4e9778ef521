"""How the runs of a comparison went: their loss over the steps, and what each says to the sample prompt.

The rule: of each variant one run is shown, the first seed's that is done, and said to be; means over seeds are the tables'
matter. Everything is read from the runs' own logs and run.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lopt_edge.adapters.base import RUN_NAME
from lopt_edge.comparison.figures import Row
from lopt_edge.pictures.curves import Series, curves
from lopt_edge.training.checkpoint.log_curves import read_curves, smoothed
from lopt_edge.training.checkpoint.output_folder import METRICS_NAME

N_HUES = 6  # in the pages' style sheet


def loss_curves(rows: Sequence[Row]) -> tuple[str, str]:
    """The pictures of (training loss, held-out loss) over the steps, a curve a variant; empty without logs."""
    trained, held_out = [], []
    for index, (row, folder) in enumerate(_shown(rows)):
        try:
            steps = _n_steps(folder)
            found = read_curves(folder / METRICS_NAME, n_steps=steps)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        trained.append(Series(row.name, smoothed(found.loss), index % N_HUES))
        held_out.append(Series(row.name, found.evaluated.get("eval_loss", []), index % N_HUES))
    return curves(trained, title="training loss, smoothed"), curves(held_out, title="held-out loss")


def samples(rows: Sequence[Row]) -> list[list[str]]:
    """The table of completions of the sample prompt: the base's, then each variant's; empty without samples."""
    found: list[list[str]] = []
    for row, folder in _shown(rows):
        try:
            said = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))["samples"]
        except (OSError, ValueError, KeyError):
            continue
        if "before" in said and not found:
            found.append(["before training", str(said["before"])])
        if "after" in said:
            found.append([row.name, str(said["after"])])
    return [["variant", "its completion"], *found] if found else []


def _shown(rows: Sequence[Row]) -> Iterator[tuple[Row, Path]]:
    """Each variant with the folder of its first run that is done."""
    for row in rows:
        done = [outcome.cell.folder for outcome in row.outcomes if outcome.figures is not None]
        if done:
            yield row, done[0]


def _n_steps(folder: Path) -> int:
    return int(json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))["totals"]["steps"])
