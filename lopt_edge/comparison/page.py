"""A comparison as one HTML page: pictures, table, remarks, settings. One file: no script, nothing fetched from elsewhere.

It follows the reader's light or dark scheme, every picture has a description in words, tables have captions and scopes, and
a table wider than the window scrolls by itself. It shows what the tables say (tables.py) and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lopt_edge.comparison.figures import Row
from lopt_edge.comparison.plots import bars, dots
from lopt_edge.comparison.tables import Table, main_table, settings_lines, tuning_table

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d1d1f; --soft: #55595f; --line: #dcdfe4;
  --dot: #0072b2; --whisker: #1d1d1f; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #e8e9eb; --soft: #a6abb3; --line: #33373e;
  --dot: #56b4e9; --whisker: #e8e9eb; } }
body { margin: 0 auto; max-width: 1600px; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 0.4rem; }
svg { display: block; width: 100%; max-width: 760px; height: auto; font-size: 12px; }
svg text { fill: var(--ink); }
svg text.soft { fill: var(--soft); }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.lead { stroke: var(--hue); stroke-width: 0.9; stroke-dasharray: 2 3; opacity: 0.75; }
.hue0 { --hue: #0072b2; } .hue1 { --hue: #d55e00; } .hue2 { --hue: #009e73; }
.hue3 { --hue: #cc79a7; } .hue4 { --hue: #e69f00; } .hue5 { --hue: #56b4e9; }
.whisker { stroke: var(--whisker); stroke-width: 1.4; }
.dot { fill: var(--hue); stroke: var(--ground); }
.bar { fill: var(--dot); }
.scroll { overflow-x: auto; }
table { font-size: 14px; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.3rem; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.settings th, .settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings th { font-weight: 400; color: var(--soft); }
ul { padding-left: 1.2rem; }
li { overflow-wrap: anywhere; }
"""


def page(rows: Sequence[Row], settings: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The text of the HTML page; `settings` are what all variants share."""
    title = f"Comparison: {', '.join(row.name for row in rows)}"
    problems = [problem for row in rows for problem in row.problems]
    tuning = tuning_table(rows)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
        "<h1>Comparison</h1>",
        *_table(main_table(rows), "one row a variant, in the order given"),
        *_list("", remarks),
        "<h2>Plots</h2>",
        '<div class="plots">',
        *_figure("Held-out loss and device memory", dots(rows, across="peak_device_bytes", upwards="eval_loss")),
        *_figure("Held-out loss and time", dots(rows, across="step_seconds", upwards="eval_loss")),
        *_figure("What is forgotten: retention loss after minus before", bars(rows, figure="forgetting")),
        "</div>",
        *(("<h2>Learning rates</h2>", *_table(tuning, "held-out loss of the first seed")) if tuning else ()),
        *_list("Runs that are not there", problems),
        "<h2>What all share</h2>",
        *_table([["setting", "value"], *map(list, settings_lines(settings))], "settings as given", kind="settings"),
        "</main></body></html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _figure(caption: str, picture: str) -> Iterator[str]:
    yield f"<figure><figcaption>{escape(caption)}</figcaption>"
    yield picture or "<p>No variant has these figures.</p>"
    yield "</figure>"


def _list(heading: str, sentences: Sequence[str]) -> Iterator[str]:
    if sentences:
        yield f"<h2>{escape(heading)}</h2>" if heading else ""
        yield f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _table(table: Table, caption: str, *, kind: str = "figures") -> Iterator[str]:
    heading, *body = table
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
    yield f'<table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>'
    yield from (f'<th scope="col">{escape(text)}</th>' for text in heading)
    yield "</tr></thead><tbody>"
    for first, *rest in body:
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
