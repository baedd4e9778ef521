"""What the pictures share: frame, grids, axes, legend rows and texts of an SVG that is written by hand.

Rules of every picture here: a number that is shown is a number that was given (nothing is smoothed). No label lies on a
plot: words are above it, below it, or in the legend to its right. A budget far above everything is in words, not drawn (it
would flatten the rest). Every text is escaped and cut to a length that has room. Colours are those of Okabe and Ito, which
colour-blind readers tell apart. One file, no script, no font or style from elsewhere.

It knows nothing of ops, plans or sweeps: step_bytes.py draws one step, sweep.py a sweep of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from xml.sax.saxutils import escape

WIDTH = 1000
LEFT, RIGHT, TOP = 72.0, 724.0, 94.0  # of the plots; the legend is to the right of them
LEGEND_LEFT, LEGEND_RIGHT = 752, 980
TALLEST_BUDGET = 2.0  # times the highest data: a budget above that is not drawn
MIB, GIB = 1 << 20, 1 << 30
TIER_COLOURS = {"device": "#0072b2", "host": "#d55e00", "disk": "#009e73"}
BUDGET_STYLE = 'stroke="#000000" stroke-width="1.6"'


def head(title: str, height: int, *, defs: str = "") -> Iterator[str]:
    """The opening tag, the title, a white ground."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="#222222" role="img">'
    )
    yield f"<title>{safe(title)}</title>"
    yield defs
    yield f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    yield text(LEFT, 28, title, most=100, size=16, weight="bold")


def is_drawn(budget_bytes: int | None, highest: float) -> bool:
    """Whether a budget is near enough to what is drawn for a line of its own."""
    return budget_bytes is not None and 0 <= budget_bytes <= TALLEST_BUDGET * highest


def budget_line(y: float) -> Iterator[str]:
    """The dashed line of the budget, at this height."""
    place = f'x1="{number(LEFT)}" x2="{number(RIGHT)}" y1="{number(y)}" y2="{number(y)}"'
    yield f'<line {place} stroke="#ffffff" stroke-width="3" stroke-opacity="0.7"/>'  # so that it shows on dark areas
    yield f'<line id="budget" {place} {BUDGET_STYLE} stroke-dasharray="8 5"/>'


# --- axes -------------------------------------------------------------------------------------------------------------


def grid(lines: Iterator[tuple[float, str]]) -> Iterator[str]:
    """The grid: a pale line at each height, its text to the left of the plot."""
    for y, words in lines:
        yield (f'<line x1="{number(LEFT)}" x2="{number(RIGHT)}" y1="{number(y)}" y2="{number(y)}" stroke="#dddddd"/>')
        yield text(LEFT - 8, y + 4, words, anchor="end")


def linear_ticks(y: Callable[[float], float], highest: float, unit: float, most: int) -> Iterator[tuple[float, str]]:
    """The ticks in round steps from 0, as (height, number of units)."""
    step = round_step(highest / unit, most)
    decimals = next(count for count in range(20) if math.isclose(step, round(step, count)))
    for index in range(int(highest / unit / step + 1e-9) + 1):
        yield y(index * step * unit), f"{index * step:,.{decimals}f}"


def axis_line(y: float) -> str:
    """The line of the x axis, at this height."""
    return f'<line x1="{number(LEFT)}" x2="{number(RIGHT)}" y1="{number(y)}" y2="{number(y)}" stroke="#222222"/>'


def tick(x: float, y: float) -> str:
    """A tick of the x axis, downwards from this point."""
    place = number(x)
    return f'<line x1="{place}" x2="{place}" y1="{number(y)}" y2="{number(y + 5)}" stroke="#222222"/>'


def round_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that makes at most `most` steps in the span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= most)


# --- the legend -------------------------------------------------------------------------------------------------------


def legend_row(y: float, name: str, value: str, *, weight: str = "normal") -> Iterator[str]:
    """A row of the legend: a name, and its value to the right."""
    yield text(LEGEND_LEFT + 22, y, name, most=20, weight=weight)
    yield text(LEGEND_RIGHT, y, value, anchor="end", weight=weight)


def legend_line(y: float, style: str, *, colour: str = "#000000") -> str:
    """A piece of line in the legend, in this style."""
    middle = number(y - 4)
    return f'<line x1="{LEGEND_LEFT}" x2="{LEGEND_LEFT + 15}" y1="{middle}" y2="{middle}" stroke="{colour}" {style}/>'


def legend_budget(y: float, value: str, note: str = "", *, note_below: float = 16) -> Iterator[str]:
    """The budget's rows of the legend, with a note below it."""
    yield legend_line(y, 'stroke-width="1.6" stroke-dasharray="5 3"')
    yield from legend_row(y, "budget", value)
    yield text(LEGEND_LEFT + 22, y + note_below, note, fill="#555555")


# --- texts ------------------------------------------------------------------------------------------------------------


def text(
    x: float,
    y: float,
    words: str,
    *,
    most: int = 80,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    fill: str = "",
) -> str:
    """A text element of at most `most` characters; nothing for an empty text."""
    extras = "".join(
        f' {name}="{value}"'
        for name, value, usual in (
            ("font-size", size, 12),
            ("font-weight", weight, "normal"),
            ("text-anchor", anchor, "start"),
            ("fill", fill, ""),
        )
        if value != usual
    )
    return f'<text x="{number(x)}" y="{number(y)}"{extras}>{safe(shortened(words, most))}</text>' if words else ""


def shortened(words: str, most: int) -> str:
    """The words cut to at most `most` characters, the cut marked."""
    return words if len(words) <= most else f"{words[: most - 1]}…"


def safe(words: str) -> str:
    """The words escaped, on one line, without the characters that XML forbids."""
    return escape("".join(letter if letter.isprintable() else " " for letter in words))


def byte_unit(highest: float) -> tuple[int, str]:
    """The unit of an axis that reaches so high."""
    return (GIB, "GiB") if highest >= 4 * GIB else (MIB, "MiB")


def bytes_text(n_bytes: int, unit: int) -> str:
    """The bytes in the unit of the axis: hundredths of a GiB, tenths of a MiB."""
    decimals, name = (2, "GiB") if unit == GIB else (1, "MiB")
    least = 10**-decimals
    if 0 < n_bytes < least * unit / 2:
        return f"<{least} {name}"
    return f"{n_bytes / unit:,.{decimals}f} {name}"


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
