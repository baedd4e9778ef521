"""The memory timeline of one training step as a picture: an SVG text, written by hand, that any browser shows.

What each category holds is stacked over the op number, in one fixed order, so that two pictures can be laid side by side.
What an op takes for a moment beyond that is hatched on top. A thin line is what was measured, a dashed one the budget.
The op of the predicted peak is marked, and the legend shows what makes up its bytes, from the top of the stack downwards.
Where the step moves something to the host or the disk, a smaller plot under the main one shows what lies there after each
op, over the same ops and in its own scale; without such bytes there is no such plot.

Rules, besides those of svg.py: when there are more ops than columns, a column shows, whole, the op of the highest peak
among those it stands for, and the highest of what was measured and of what lay on a lower tier there: so no peak is ever
lost, and a stack is one that really existed. The peak is named above the plot. Unknown categories take Paul Tol's colours.

It draws what it is given. It computes no bytes and knows nothing of plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lopt_edge.pictures.svg import (
    LEFT,
    LEGEND_LEFT,
    LEGEND_RIGHT,
    RIGHT,
    TIER_COLOURS,
    TOP,
    axis_line,
    budget_line,
    byte_unit,
    bytes_text,
    grid,
    head,
    is_drawn,
    legend_budget,
    legend_line,
    legend_row,
    linear_ticks,
    number,
    round_step,
    safe,
    shortened,
    text,
    tick,
)

HEIGHT, BOTTOM = 520, 462.0
LOWER_TOP, LOWER_BOTTOM, LOWER_HEIGHT = 516.0, 612.0, 670  # with the plot of the tiers below
LOWER_TIERS = {"host": 1.2, "disk": 2.6}  # stroke widths: the host's line shows on the disk's where they are equal
HEADROOM = 1.04  # between the highest data and the top of a plot
COLUMNS = 1000  # most columns of a picture; it has fewer pixels than that
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
MOMENT_PATTERN = (
    '<defs><pattern id="moment" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" fill="#ffffff"/><rect width="1.6" height="5" fill="#8c8c8c"/></pattern></defs>'
)


@dataclass(frozen=True)
class OpRow:
    """The bytes of one op of the step. `held` is by category, while the op runs; `peak_bytes` is at least its sum.

    `host_bytes` and `disk_bytes` are what lies on the tiers below, once the op has run.
    """

    text: str
    held: Mapping[str, int]
    peak_bytes: int
    measured_bytes: int | None
    host_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class _Column:
    """A column of the plot: ops `first` to `last`, shown by the one of them that has the highest peak."""

    first: int
    last: int
    position: int  # of the op that is shown
    row: OpRow
    measured_bytes: int | None
    below: Mapping[str, int]


@dataclass(frozen=True)
class _Scale:
    """The scale of the plot, from op numbers and bytes to pixels."""

    n_ops: int
    highest: int
    top: float = TOP
    bottom: float = BOTTOM

    @property
    def top_bytes(self) -> float:
        return self.highest * HEADROOM

    def x(self, op: float) -> float:
        return LEFT + op / self.n_ops * (RIGHT - LEFT)

    def y(self, n_bytes: float) -> float:
        return self.bottom - n_bytes / self.top_bytes * (self.bottom - self.top)


def draw_timeline(rows: Sequence[OpRow], *, title: str, budget_bytes: int | None = None, baseline: str = "") -> str:
    """The SVG text of a step's timeline, 1000 x 520, or 1000 x 670 where a lower tier has bytes.

    `baseline` is a line under the title: what the bytes compare with.
    Raises ValueError where there are no rows, or an op's peak is below what it holds.
    """
    _check(rows)
    columns = _columns(rows)
    peak = max(columns, key=lambda column: column.row.peak_bytes)  # the first of equal ones
    categories = _categories(rows)
    highest = max(peak.row.peak_bytes, *(column.measured_bytes or 0 for column in columns), 1)
    budget_fits = is_drawn(budget_bytes, highest)
    shown = max(highest, (budget_bytes or 0) if budget_fits else 0)
    unit, _ = byte_unit(shown)
    scale = _Scale(len(rows), shown)
    below = {tier: max(column.below[tier] for column in columns) for tier in LOWER_TIERS}
    parts = [
        *head(title, LOWER_HEIGHT if any(below.values()) else HEIGHT, defs=MOMENT_PATTERN),
        text(LEFT, 48, baseline, most=140, fill="#555555"),
        *_y_axis(scale, 6),
        *_areas(columns, categories, scale),
        *_x_axis(scale, words=not any(below.values())),
        *_lines(columns, scale, budget_bytes if budget_fits else None),
        *_peak_mark(peak, scale, unit),
        *_legend(columns, peak, categories, unit, budget_bytes, budget_fits),
        *(_lower_plot(columns, below, len(rows)) if any(below.values()) else ()),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _check(rows: Sequence[OpRow]) -> None:
    if not rows:
        raise ValueError("a timeline needs at least one op")
    for position, row in enumerate(rows):
        if any(n_bytes < 0 for n_bytes in row.held.values()):
            raise ValueError(f"op {position} ({row.text}) holds fewer than 0 bytes")
        if min(row.host_bytes, row.disk_bytes) < 0:
            raise ValueError(f"op {position} ({row.text}) has fewer than 0 bytes on a lower tier")
        total = sum(row.held.values())
        if row.peak_bytes < total:
            raise ValueError(f"op {position} ({row.text}) holds {total} bytes, but its peak is {row.peak_bytes}")


def _columns(rows: Sequence[OpRow]) -> list[_Column]:
    width = math.ceil(len(rows) / COLUMNS)
    found = []
    for first in range(0, len(rows), width):
        last = min(first + width, len(rows)) - 1
        position = max(range(first, last + 1), key=lambda index: rows[index].peak_bytes)
        here = rows[first : last + 1]
        measured = [row.measured_bytes for row in here if row.measured_bytes is not None]
        below = {"host": max(row.host_bytes for row in here), "disk": max(row.disk_bytes for row in here)}
        found.append(_Column(first, last, position, rows[position], max(measured, default=None), below))
    return found


def _categories(rows: Sequence[OpRow]) -> dict[str, str]:
    """The colour of each category, from the bottom of the stack; those that never have a byte are left out."""
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
    """The filled outlines, one a category, each down to zero, the highest first: so there is no seam between neighbours."""
    stacks = [_stack(column.row, categories) for column in columns]
    for level, (name, colour) in reversed(list(enumerate(categories.items()))):
        steps = _steps([(column.first, stack[level]) for column, stack in zip(columns, stacks, strict=True)], scale)
        path = f"M{number(LEFT)},{number(BOTTOM)}V{steps}V{number(BOTTOM)}Z"
        yield f'<path fill="{colour}" d="{path}"><title>{safe(name)}</title></path>'


def _steps(levels: Sequence[tuple[int, int]], scale: _Scale, *, end: int | None = None) -> str:
    """The path from the first level to the end of the last one, without its first move; equal neighbours are joined."""
    parts = [number(scale.y(levels[0][1]))]
    for first, n_bytes in levels[1:]:
        height = number(scale.y(n_bytes))
        if height != parts[-1].rpartition("V")[2]:
            parts.append(f"H{number(scale.x(first))}V{height}")
    return "".join([*parts, f"H{number(scale.x(scale.n_ops if end is None else end))}"])


def _lines(columns: Sequence[_Column], scale: _Scale, budget_bytes: int | None) -> Iterator[str]:
    """The line of what was measured, with gaps where nothing was, and the budget's."""
    run: list[tuple[int, int]] = []
    path = ""
    for column in [*columns, None]:
        if column is not None and column.measured_bytes is not None:
            run.append((column.first, column.measured_bytes))
        elif run:
            end = scale.n_ops if column is None else column.first
            path += f"M{number(scale.x(run[0][0]))},{_steps(run, scale, end=end)}"
            run = []
    if path:
        width = 1.2 if len(columns) <= 300 else 0.6
        yield f'<path id="measured" fill="none" stroke="#000000" stroke-width="{width}" d="{path}"/>'
    if budget_bytes is not None:
        yield from budget_line(scale.y(budget_bytes))


def _peak_mark(peak: _Column, scale: _Scale, unit: int) -> Iterator[str]:
    """A pointer to the peak, and its bytes, number and op above the plot."""
    x, y = scale.x((peak.first + peak.last + 1) / 2), scale.y(peak.row.peak_bytes)
    words = f"peak {bytes_text(peak.row.peak_bytes, unit)} at op {peak.position:,}: {shortened(peak.row.text, 60)}"
    share = (x - LEFT) / (RIGHT - LEFT)
    anchor = "start" if share < 0.3 else "end" if share > 0.7 else "middle"
    yield f'<line x1="{number(x)}" x2="{number(x)}" y1="{TOP - 14}" y2="{number(y - 7)}" stroke="#000000"/>'
    yield f'<path id="peak" d="M{number(x)},{number(y)}l-4.5,-9h9z"/>'
    yield text(x, TOP - 20, words, most=110, weight="bold", anchor=anchor)


def _y_axis(scale: _Scale, most: int) -> Iterator[str]:
    unit, unit_name = byte_unit(scale.highest)
    yield from grid(linear_ticks(scale.y, scale.top_bytes, unit, most))
    yield text(LEFT - 8, scale.top - 8, unit_name, anchor="end", fill="#555555")


def _x_axis(scale: _Scale, *, words: bool = True) -> Iterator[str]:
    """The numbers from 0, as in a plan's text; a tick stands under the middle of its op."""
    yield axis_line(scale.bottom)
    for op in range(0, scale.n_ops, math.ceil(round_step(scale.n_ops, 8))):
        x = scale.x(op + 0.5)
        yield tick(x, scale.bottom)
        yield text(x, scale.bottom + 19, f"{op:,}" if words else "", anchor="middle")
    ops = f"op of the step ({scale.n_ops:,} in all)" if scale.n_ops > 1 else "op of the step"
    yield text((LEFT + RIGHT) / 2, scale.bottom + 40, ops if words else "", anchor="middle", fill="#555555")


# --- the tiers below --------------------------------------------------------------------------------------------------


def _lower_plot(columns: Sequence[_Column], below: Mapping[str, int], n_ops: int) -> Iterator[str]:
    """The step lines of the lower tiers, those that hold nothing left out, and each one's highest."""
    unit, _ = byte_unit(max(below.values()))
    scale = _Scale(n_ops, max(below.values()), LOWER_TOP, LOWER_BOTTOM)
    yield from _y_axis(scale, 3)
    yield from _x_axis(scale)
    yield text(LEFT, LOWER_TOP - 8, "on the tiers below", fill="#555555")
    yield text(LEGEND_LEFT, LOWER_TOP + 4, "on the tiers below, highest", weight="bold")
    shown = [tier for tier in LOWER_TIERS if below[tier]]
    for row, tier in reversed(list(enumerate(shown, start=1))):
        style = f'stroke-width="{LOWER_TIERS[tier]}"'
        steps = _steps([(column.first, column.below[tier]) for column in columns], scale)
        path = f"M{number(LEFT)},{steps}"
        yield f'<path id="{tier}" fill="none" stroke="{TIER_COLOURS[tier]}" {style} d="{path}"/>'
        yield legend_line(LOWER_TOP + 4 + 22 * row, style, colour=TIER_COLOURS[tier])
        yield from legend_row(LOWER_TOP + 4 + 22 * row, tier, bytes_text(below[tier], unit))


# --- the legend -------------------------------------------------------------------------------------------------------


def _legend(
    columns: Sequence[_Column],
    peak: _Column,
    categories: Mapping[str, str],
    unit: int,
    budget_bytes: int | None,
    budget_fits: bool,
) -> Iterator[str]:
    """The legend: what makes up the peak, from the top of the stack down, then the lines."""
    held = {**peak.row.held, MOMENT: peak.row.peak_bytes - sum(peak.row.held.values())}
    measured = [column for column in columns if column.measured_bytes is not None]
    n_rows = len(categories) + 2 + 2 * bool(measured) + 2 * (budget_bytes is not None)
    height = min(22.0, (BOTTOM - TOP - 6) / n_rows)
    y = TOP + 4
    yield text(LEGEND_LEFT, y, f"at op {peak.position:,}, the peak", weight="bold")
    for name, colour in reversed(list(categories.items())):
        y += height
        yield (
            f'<rect x="{LEGEND_LEFT}" y="{number(y - 10)}" width="14" height="12" fill="{colour}" '
            'stroke="#555555" stroke-width="0.5"/>'
        )
        yield from legend_row(y, name, bytes_text(held.get(name, 0), unit))
    y += height + 6
    rule = number(y - height / 2 - 7)
    yield f'<line x1="{LEGEND_LEFT}" x2="{LEGEND_RIGHT}" y1="{rule}" y2="{rule}" stroke="#aaaaaa"/>'
    yield from legend_row(y, "predicted", bytes_text(peak.row.peak_bytes, unit), weight="bold")
    if measured:
        y += height
        here = peak.row.measured_bytes
        yield legend_line(y, 'stroke-width="1.2"')
        yield from legend_row(y, "measured", "-" if here is None else bytes_text(here, unit))
        best = max(measured, key=lambda column: column.measured_bytes or 0)
        if best.measured_bytes != here:
            y += height
            yield from legend_row(y, "measured, highest", bytes_text(best.measured_bytes or 0, unit))
    if budget_bytes is not None:
        y += height
        note = "" if budget_fits else "above this picture"
        yield from legend_budget(y, bytes_text(budget_bytes, unit), note, note_below=min(height, 16))
