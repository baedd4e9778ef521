"""The frame of our HTML pages (a run's report, a comparison): one file, no script, nothing fetched from elsewhere.

A page follows the reader's light or dark scheme and a narrow window; every picture has a description in words, tables have
captions and scopes, and what is wider than the window scrolls by itself. Every text that is passed in is escaped here, and
none of it is a command for a terminal or a browser. What a page says is its caller's.

The pictures are SVG written by hand (svg.py, curves.py) and not by matplotlib or plotly: those would be the largest
dependency here after torch, their files carry colours that do not follow the reader's scheme, or scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from quant.untrusted import printable

Table = Sequence[Sequence[str]]  # the heading, then the rows

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
polyline.lead, .front { fill: none; }
.front { stroke: var(--soft); stroke-width: 1.2; }
.whisker { stroke: var(--whisker); stroke-width: 1.4; }
.dot { fill: var(--hue); stroke: var(--ground); }
.bar { fill: var(--dot); }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { font-size: 14px; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.3rem; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.settings th, .settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings th { font-weight: 400; color: var(--soft); white-space: nowrap; overflow-wrap: normal; }
ul { padding-left: 1.2rem; }
li { overflow-wrap: anywhere; }
.curves .line { fill: none; stroke: var(--hue); stroke-width: 1.8; stroke-linejoin: round; }
.curves .faint { fill: none; stroke: var(--hue); stroke-width: 1; opacity: 0.5; }
.curves circle { fill: var(--hue); }
.curves .limit { stroke: var(--soft); stroke-width: 1.4; stroke-dasharray: 6 4; }
.picture { overflow-x: auto; background: #ffffff; border-radius: 4px; }
.picture svg text { fill: #222222; }
.picture svg { max-width: 1000px; min-width: 640px; }
pre { overflow-x: auto; padding: 0.7rem; border: 1px solid var(--line); border-radius: 4px; font-size: 13px; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1.5rem; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page: head, style and `parts`, which are HTML already."""
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{words(title)}</title><style>{STYLE}</style></head><body><main>",
    ]
    return "\n".join([*head, *parts, "</main></body></html>"]) + "\n"


def words(text: str) -> str:
    """A text as HTML: escaped, its control characters shown."""
    return escape("\n".join(printable(line) for line in text.split("\n")))


def figure(caption: str, picture: str, *, nothing: str) -> Iterator[str]:
    """A picture (SVG) with its caption, or the sentence that says why there is none."""
    yield f"<figure><figcaption>{words(caption)}</figcaption>"
    yield picture or f"<p>{words(nothing)}</p>"
    yield "</figure>"


def bullets(heading: str, sentences: Sequence[str]) -> Iterator[str]:
    """A list under a heading; nothing where there is nothing to say."""
    if sentences:
        yield f"<h2>{words(heading)}</h2>" if heading else ""
        yield f"<ul>{''.join(f'<li>{words(sentence)}</li>' for sentence in sentences)}</ul>"


def table(rows: Table, caption: str, *, kind: str = "figures") -> Iterator[str]:
    """A table with its first row as heading; `kind` is its class in the style sheet (figures, settings)."""
    heading, *body = rows
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{words(caption)}">'
    yield f'<table class="{kind}"><caption>{words(caption)}</caption><thead><tr>'
    yield from (f'<th scope="col">{words(text)}</th>' for text in heading)
    yield "</tr></thead><tbody>"
    for first, *rest in body:
        cells = "".join(f"<td>{words(text)}</td>" for text in rest)
        yield f'<tr><th scope="row">{words(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
