"""The memory timeline of one training step as a picture: an SVG text, written by hand, that any browser shows.

What each category holds is stacked over the op number, in one fixed order, so that two pictures can be laid side by side.
What an op takes for a moment beyond that is hatched on top. A thin line is what was measured, a dashed one the budget.
The op of the predicted peak is marked, and the legend tells what makes up its bytes, from the top of the stack downwards.

Rules: a number in the picture is a number of the rows (nothing is smoothed). When there are more ops than columns, a
column shows, whole, the op of the highest peak among those it stands for, and the highest of what was measured there: so
the peak is never lost, and a stack is one that really existed. No label lies on the plot: the peak is named
above the plot, all other words are beside it. A budget far above everything is told, not drawn (it would flatten the rest).
Every text is escaped. Colours are those of Okabe and Ito, which colour-blind readers tell apart, with greys.

It draws what it is given. It computes no bytes and knows nothing of plans or tiers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 520
LEFT, RIGHT, TOP, BOTTOM = 72.0, 724.0, 94.0, 462.0  # the plot; the legend is to the right of it
LEGEND_LEFT, LEGEND_RIGHT = 752, 980
COLUMNS = 1000  # most columns of a picture; it has fewer pixels than that
TALLEST_BUDGET = 2.0  # times the highest data: a budget above that is not drawn
MIB, GIB = 1 << 20, 1 << 30
COLOURS = {  # in drawing order from the bottom
    "library": "#8c8c8c",
    "weights": "#0072b2",
    "adapters": "#56b4e9",
    "optimizer": "#009e73",
    "gradients": "#f0e442",
    "aux heads": "#882255",
    "saved inputs": "#e69f00",
    "activations": "#d55e00",
    "head": "#cc79a7",
    "workspace": "#d0d0d0",
}
OTHER_COLOURS = ("#332288", "#44aa99", "#ddcc77", "#117733", "#aa4499")  # Paul Tol's, for categories unknown here
MOMENT = "within the op"  # what an op's peak exceeds its categories by


@dataclass(frozen=True)
class OpRow:
    """One op of the step. `held` is by category, while the op runs; `peak_bytes` is at least its sum."""

    text: str
    held: Mapping[str, int]
    peak_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True)
class _Column:
    """Ops `first` to `last`, shown by the one of them that has the highest peak."""

    first: int
    last: int
    position: int  # of the op that is shown
    row: OpRow
    measured_bytes: int | None


@dataclass(frozen=True)
class _Scale:
    """Op numbers and bytes to pixels."""

    n_ops: int
    top_bytes: float

    def x(self, op: float) -> float:
        return LEFT + op / self.n_ops * (RIGHT - LEFT)

    def y(self, n_bytes: float) -> float:
        return BOTTOM - n_bytes / self.top_bytes * (BOTTOM - TOP)


def draw_timeline(rows: Sequence[OpRow], *, title: str, budget_bytes: int | None = None, baseline: str = "") -> str:
    """The SVG text of a step's timeline, 1000 x 520. `baseline` is a line under the title: what the bytes compare with.

    Raises ValueError where there are no rows, or an op's peak is below what it holds.
    """
    _check(rows)
    columns = _columns(rows)
    peak = max(columns, key=lambda column: column.row.peak_bytes)  # the first of equal ones
    categories = _categories(rows)
    highest = max(peak.row.peak_bytes, *(column.measured_bytes or 0 for column in columns), 1)
    budget_fits = budget_bytes is not None and 0 <= budget_bytes <= TALLEST_BUDGET * highest
    shown = max(highest, (budget_bytes or 0) if budget_fits else 0)
    unit, unit_name = (GIB, "GiB") if shown >= 4 * GIB else (MIB, "MiB")
    scale = _Scale(len(rows), shown * 1.04)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="#222222" role="img">',
        f"<title>{_safe(title)}</title>",
        '<defs><pattern id="moment" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="5" height="5" fill="#ffffff"/><rect width="1.6" height="5" fill="#8c8c8c"/></pattern></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 28, title, most=100, size=16, weight="bold"),
        _text(LEFT, 48, baseline, most=140, fill="#555555"),
        *_y_axis(scale, unit, unit_name),
        *_areas(columns, categories, scale),
        *_x_axis(len(rows), scale),
        *_lines(columns, scale, budget_bytes if budget_fits else None),
        *_peak_mark(peak, scale, unit),
        *_legend(columns, peak, categories, unit, budget_bytes, budget_fits),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _check(rows: Sequence[OpRow]) -> None:
    if not rows:
        raise ValueError("a timeline needs at least one op")
    for position, row in enumerate(rows):
        if any(n_bytes < 0 for n_bytes in row.held.values()):
            raise ValueError(f"op {position} ({row.text}) holds fewer than 0 bytes")
        total = sum(row.held.values())
        if row.peak_bytes < total:
            raise ValueError(f"op {position} ({row.text}) holds {total} bytes, but its peak is {row.peak_bytes}")


def _columns(rows: Sequence[OpRow]) -> list[_Column]:
    width = math.ceil(len(rows) / COLUMNS)
    found = []
    for first in range(0, len(rows), width):
        last = min(first + width, len(rows)) - 1
        position = max(range(first, last + 1), key=lambda index: rows[index].peak_bytes)
        measured = [row.measured_bytes for row in rows[first : last + 1] if row.measured_bytes is not None]
        found.append(_Column(first, last, position, rows[position], max(measured, default=None)))
    return found


def _categories(rows: Sequence[OpRow]) -> dict[str, str]:
    """Category -> colour, from the bottom of the stack; those that never hold a byte are left out."""
    held = {name: None for row in rows for name, n_bytes in row.held.items() if n_bytes}  # in order of appearance
    known = {name: colour for name, colour in COLOURS.items() if name in held}
    others = [name for name in held if name not in COLOURS]
    found = known | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}
    if any(row.peak_bytes > sum(row.held.values()) for row in rows):
        found[MOMENT] = "url(#moment)"
    return found


def _stack(row: OpRow, categories: Mapping[str, str]) -> list[int]:
    """The top of each category's layer of the stack, in bytes."""
    held = [row.held.get(name, 0) for name in categories if name != MOMENT]
    return [*accumulate(held), *([row.peak_bytes] if MOMENT in categories else [])]


# --- the plot ---------------------------------------------------------------------------------------------------------


def _areas(columns: Sequence[_Column], categories: Mapping[str, str], scale: _Scale) -> Iterator[str]:
    """One filled outline a category, each down to zero, the highest first: so there is no seam between neighbours."""
    stacks = [_stack(column.row, categories) for column in columns]
    for level, (name, colour) in reversed(list(enumerate(categories.items()))):
        steps = _steps([(column.first, stack[level]) for column, stack in zip(columns, stacks, strict=True)], scale)
        path = f"M{_number(LEFT)},{_number(BOTTOM)}V{steps}V{_number(BOTTOM)}Z"
        yield f'<path fill="{colour}" d="{path}"><title>{_safe(name)}</title></path>'


def _steps(levels: Sequence[tuple[int, int]], scale: _Scale, *, end: int | None = None) -> str:
    """The path from the first level to the end of the last one, without its first move; equal neighbours are joined."""
    parts = [_number(scale.y(levels[0][1]))]
    for first, n_bytes in levels[1:]:
        height = _number(scale.y(n_bytes))
        if height != parts[-1].rpartition("V")[2]:
            parts.append(f"H{_number(scale.x(first))}V{height}")
    return "".join([*parts, f"H{_number(scale.x(scale.n_ops if end is None else end))}"])


def _lines(columns: Sequence[_Column], scale: _Scale, budget_bytes: int | None) -> Iterator[str]:
    """What was measured, with gaps where nothing was, and the budget."""
    run: list[tuple[int, int]] = []
    path = ""
    for column in [*columns, None]:
        if column is not None and column.measured_bytes is not None:
            run.append((column.first, column.measured_bytes))
        elif run:
            end = scale.n_ops if column is None else column.first
            path += f"M{_number(scale.x(run[0][0]))},{_steps(run, scale, end=end)}"
            run = []
    if path:
        width = 1.2 if len(columns) <= 300 else 0.6
        yield f'<path id="measured" fill="none" stroke="#000000" stroke-width="{width}" d="{path}"/>'
    if budget_bytes is not None:
        y = _number(scale.y(budget_bytes))
        place = f'x1="{_number(LEFT)}" x2="{_number(RIGHT)}" y1="{y}" y2="{y}"'
        yield f'<line {place} stroke="#ffffff" stroke-width="3" stroke-opacity="0.7"/>'  # so that it shows on dark areas
        yield f'<line id="budget" {place} stroke="#000000" stroke-width="1.6" stroke-dasharray="8 5"/>'


def _peak_mark(peak: _Column, scale: _Scale, unit: int) -> Iterator[str]:
    """A pointer to the peak, and its bytes, number and op above the plot."""
    x, y = scale.x((peak.first + peak.last + 1) / 2), scale.y(peak.row.peak_bytes)
    words = f"peak {_bytes_text(peak.row.peak_bytes, unit)} at op {peak.position:,}: {_shortened(peak.row.text, 60)}"
    share = (x - LEFT) / (RIGHT - LEFT)
    anchor = "start" if share < 0.3 else "end" if share > 0.7 else "middle"
    yield f'<line x1="{_number(x)}" x2="{_number(x)}" y1="{TOP - 14}" y2="{_number(y - 7)}" stroke="#000000"/>'
    yield f'<path id="peak" d="M{_number(x)},{_number(y)}l-4.5,-9h9z"/>'
    yield _text(x, TOP - 20, words, most=110, weight="bold", anchor=anchor)


def _y_axis(scale: _Scale, unit: int, unit_name: str) -> Iterator[str]:
    step = _round_step(scale.top_bytes / unit, 6)
    decimals = next(count for count in range(20) if math.isclose(step, round(step, count)))
    for index in range(int(scale.top_bytes / unit / step + 1e-9) + 1):
        y = scale.y(index * step * unit)
        yield (f'<line x1="{_number(LEFT)}" x2="{_number(RIGHT)}" y1="{_number(y)}" y2="{_number(y)}" '
               'stroke="#dddddd"/>')  # fmt: skip
        yield _text(LEFT - 8, y + 4, f"{index * step:,.{decimals}f}", anchor="end")
    yield _text(LEFT - 8, TOP - 8, unit_name, anchor="end", fill="#555555")


def _x_axis(n_ops: int, scale: _Scale) -> Iterator[str]:
    """Numbers from 0, as in a plan's text; a tick stands under the middle of its op."""
    yield (f'<line x1="{_number(LEFT)}" x2="{_number(RIGHT)}" y1="{_number(BOTTOM)}" y2="{_number(BOTTOM)}" '
           'stroke="#222222"/>')  # fmt: skip
    for op in range(0, n_ops, math.ceil(_round_step(n_ops, 8))):
        x = _number(scale.x(op + 0.5))
        yield f'<line x1="{x}" x2="{x}" y1="{_number(BOTTOM)}" y2="{_number(BOTTOM + 5)}" stroke="#222222"/>'
        yield _text(scale.x(op + 0.5), BOTTOM + 19, f"{op:,}", anchor="middle")
    ops = f"op of the step ({n_ops:,} in all)" if n_ops > 1 else "op of the step"
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 40, ops, anchor="middle", fill="#555555")


def _round_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that makes at most `most` steps in the span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= most)


# --- the legend -------------------------------------------------------------------------------------------------------


def _legend(
    columns: Sequence[_Column],
    peak: _Column,
    categories: Mapping[str, str],
    unit: int,
    budget_bytes: int | None,
    budget_fits: bool,
) -> Iterator[str]:
    """What makes up the peak, from the top of the stack down, then the lines."""
    held = {**peak.row.held, MOMENT: peak.row.peak_bytes - sum(peak.row.held.values())}
    measured = [column for column in columns if column.measured_bytes is not None]
    n_rows = len(categories) + 2 + 2 * bool(measured) + 2 * (budget_bytes is not None)
    height = min(22.0, (BOTTOM - TOP - 6) / n_rows)
    y = TOP + 4
    yield _text(LEGEND_LEFT, y, f"at op {peak.position:,}, the peak", weight="bold")
    for name, colour in reversed(list(categories.items())):
        y += height
        yield (f'<rect x="{LEGEND_LEFT}" y="{_number(y - 10)}" width="14" height="12" fill="{colour}" '
               'stroke="#555555" stroke-width="0.5"/>')  # fmt: skip
        yield from _legend_row(y, name, _bytes_text(held.get(name, 0), unit))
    y += height + 6
    rule = _number(y - height / 2 - 7)
    yield f'<line x1="{LEGEND_LEFT}" x2="{LEGEND_RIGHT}" y1="{rule}" y2="{rule}" stroke="#aaaaaa"/>'
    yield from _legend_row(y, "predicted", _bytes_text(peak.row.peak_bytes, unit), weight="bold")
    if measured:
        y += height
        here = peak.row.measured_bytes
        yield _legend_line(y, 'stroke-width="1.2"')
        yield from _legend_row(y, "measured", "-" if here is None else _bytes_text(here, unit))
        best = max(measured, key=lambda column: column.measured_bytes or 0)
        if best.measured_bytes != here:
            y += height
            yield from _legend_row(y, "measured, highest", _bytes_text(best.measured_bytes or 0, unit))
    if budget_bytes is not None:
        y += height
        yield _legend_line(y, 'stroke-width="1.6" stroke-dasharray="5 3"')
        yield from _legend_row(y, "budget", _bytes_text(budget_bytes, unit))
        if not budget_fits:
            yield _text(LEGEND_LEFT + 22, y + min(height, 16), "above this picture", fill="#555555")


def _legend_row(y: float, name: str, value: str, *, weight: str = "normal") -> Iterator[str]:
    yield _text(LEGEND_LEFT + 22, y, name, most=20, weight=weight)
    yield _text(LEGEND_RIGHT, y, value, anchor="end", weight=weight)


def _legend_line(y: float, style: str) -> str:
    middle = _number(y - 4)
    return f'<line x1="{LEGEND_LEFT}" x2="{LEGEND_LEFT + 15}" y1="{middle}" y2="{middle}" stroke="#000000" {style}/>'


# --- texts ------------------------------------------------------------------------------------------------------------


def _text(
    x: float, y: float, text: str, *, most: int = 80, size: int = 12, weight: str = "normal", anchor: str = "start",
    fill: str = "",
) -> str:  # fmt: skip
    """A text element of at most `most` characters; nothing for an empty text."""
    extras = "".join(
        f' {name}="{value}"'
        for name, value, usual in (("font-size", size, 12), ("font-weight", weight, "normal"),
                                   ("text-anchor", anchor, "start"), ("fill", fill, ""))
        if value != usual
    )  # fmt: skip
    return f'<text x="{_number(x)}" y="{_number(y)}"{extras}>{_safe(_shortened(text, most))}</text>' if text else ""


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _safe(text: str) -> str:
    """Escaped, on one line, without the characters that XML forbids."""
    return escape("".join(letter if letter.isprintable() else " " for letter in text))


def _bytes_text(n_bytes: int, unit: int) -> str:
    """In the unit of the axis: hundredths of a GiB, tenths of a MiB."""
    decimals, name = (2, "GiB") if unit == GIB else (1, "MiB")
    least = 10**-decimals
    if 0 < n_bytes < least * unit / 2:
        return f"<{least} {name}"
    return f"{n_bytes / unit:,.{decimals}f} {name}"


def _number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
