"""A comparison as one HTML page: pictures, table, remarks, settings. One file: no script, nothing fetched from elsewhere.

It follows the reader's light or dark scheme, every picture has a description in words, tables have captions and scopes, and
a table wider than the window scrolls by itself. It shows what the tables say (tables.py) and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lopt_edge.comparison.course import loss_curves, samples
from lopt_edge.comparison.figures import Row
from lopt_edge.comparison.paired import paired_table
from lopt_edge.comparison.plots import bars, dots, rate_curves
from lopt_edge.comparison.tables import main_table, settings_lines, tuning_table
from lopt_edge.pictures.html import bullets, document, figure, table


def page(rows: Sequence[Row], settings: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The text of the HTML page; `settings` are what all variants share."""
    title = f"Comparison: {', '.join(row.name for row in rows)}"
    problems = [problem for row in rows for problem in row.problems]
    tuning, paired = tuning_table(rows), paired_table(rows)
    trained, held_out = loss_curves(rows)
    said = samples(rows)
    parts = [
        "<h1>Comparison</h1>",
        *table(main_table(rows), "one row a variant, in the order given"),
        *bullets("", remarks),
        "<h2>Plots</h2>",
        '<div class="plots">',
        *_figure("Training loss of the first seed, smoothed", trained),
        *_figure("Held-out loss of the first seed", held_out),
        *_figure("Held-out loss and device memory", dots(rows, across="peak_device_bytes", upwards="eval_loss")),
        *_figure("Held-out loss and time", dots(rows, across="step_seconds", upwards="eval_loss")),
        *(_figure("Held-out loss and training time, with the front", found)
          if (found := dots(rows, across="train_seconds", upwards="eval_loss", front=True)) else ()),
        *(_figure("Held-out loss and what is forgotten, with the front", found)
          if (found := dots(rows, across="forgetting", upwards="eval_loss", front=True)) else ()),
        *(_figure("The same along each variant's learning rates, first seed", found)
          if (found := rate_curves(rows)) else ()),
        *_figure("What is forgotten: retention loss after minus before", bars(rows, figure="forgetting")),
        "</div>",
        *(("<h2>Differences, paired by seed</h2>", *table(paired, "mean ± 95% interval")) if paired else ()),
        *(("<h2>Learning rates</h2>", *table(tuning, "held-out loss of the first seed")) if tuning else ()),
        *(("<h2>Samples</h2>", *table(said, "of the first seed", kind="settings")) if said else ()),
        *bullets("Runs that are not there", problems),
        "<h2>What all share</h2>",
        *table([["setting", "value"], *map(list, settings_lines(settings))], "settings as given", kind="settings"),
    ]  # fmt: skip
    return document(title, parts)


def _figure(caption: str, picture: str) -> Iterator[str]:
    return figure(caption, picture, nothing="No variant has these figures.")
