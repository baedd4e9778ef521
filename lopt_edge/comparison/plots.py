"""The pictures of a comparison: inline SVG for one HTML page, drawn by hand, coloured by the page's style sheet.

Rules, as for the other pictures (pictures/svg.py): a number that is shown is a number that was given; no label lies on a
plot. Names stand to the right of a plot, in the order of their dots and led to them by a thin line, so that dots may lie
as close as they like. Dot, line and the mark before the name share a hue; neighbours' hues differ, and no hue means
anything (six of Okabe and Ito's palette, made for the colour-blind). Whiskers are one standard deviation to both sides.
Axes of dots begin where the data do (a dot's place is read, not its length); bars begin at 0.

Each picture carries a title and, for those who do not see it, all of its numbers as a description.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lopt_edge.comparison.figures import FIGURES, Row, Spread
from lopt_edge.pictures.svg import MIB, byte_unit, number, round_step, safe

WIDTH = 720
LEFT, RIGHT, TOP = 68.0, 470.0, 28.0
NAMES_LEFT, NAME_GAP, LONGEST_NAME = 496.0, 16.0, 30
BARS_LEFT, BARS_RIGHT, BAR_STEP = 232.0, 560.0, 28.0
N_HUES = 6  # in the page's style sheet
MARGIN = 0.06  # of an axis, on both sides of the data


@dataclass(frozen=True)
class _Axis:
    """An axis: values to pixels, with round ticks."""

    low: float
    high: float
    begin: float
    end: float
    unit: float = 1.0

    def at(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self, most: int) -> Iterator[tuple[float, str]]:
        step = round_step((self.high - self.low) / self.unit, most)
        decimals = next(count for count in range(12) if math.isclose(step, round(step, count)))
        first = math.ceil(self.low / self.unit / step - 1e-9)
        for index in range(first, math.floor(self.high / self.unit / step + 1e-9) + 1):
            yield self.at(index * step * self.unit), f"{index * step:,.{decimals}f}"


def _axis(spreads: Sequence[Spread], begin: float, end: float, *, unit: float = 1.0, zero: bool = False) -> _Axis:
    edges = [edge for one in spreads for edge in _reach(one)] + ([0.0] if zero else [])
    low, high = min(edges), max(edges)
    room = (high - low) * MARGIN or abs(high) * 0.02 or unit
    kept_low, kept_high = zero and low == 0, zero and high == 0 and low < 0
    return _Axis(low if kept_low else low - room, high if kept_high else high + room, begin, end, unit)


def _reach(spread: Spread) -> tuple[float, float]:
    middle, half = spread.mean or 0.0, spread.std or 0.0
    return middle - half, middle + half


# --- dots -------------------------------------------------------------------------------------------------------------


def dots(rows: Sequence[Row], *, across: str, upwards: str, front: bool = False) -> str:
    """The picture of one figure over another, a dot a variant; empty where no variant has both.

    `front`: a line through the variants that no other one beats in both figures, of which less is better.
    """
    shown = [row for row in rows if row.spread(across).values and row.spread(upwards).values]
    if not shown:
        return ""
    height = max(300.0, TOP + NAME_GAP * len(shown) + 60)
    bottom = height - 48
    unit = float(byte_unit(max(row.spread(across).mean or 0 for row in shown))[0]) if _bytes(across) else 1.0
    x_axis = _axis([row.spread(across) for row in shown], LEFT, RIGHT, unit=unit)
    y_axis = _axis([row.spread(upwards) for row in shown], bottom, TOP)
    title = f"{FIGURES[upwards].heading} over {FIGURES[across].heading}"
    said = "; ".join(_said(row, upwards, across) for row in shown)
    places = {
        row.name: (x_axis.at(row.spread(across).mean or 0), y_axis.at(row.spread(upwards).mean or 0)) for row in shown
    }
    hues = {name: f"hue{index % N_HUES}" for index, name in enumerate(_from_above(places))}
    return _svg(
        title,
        said,
        height,
        [
            *_grid(x_axis, y_axis, bottom),
            _text((LEFT + RIGHT) / 2, bottom + 38, _axis_name(across, unit), anchor="middle", kind="soft"),
            _text(4, TOP - 12, FIGURES[upwards].heading, kind="soft"),
            *_names(places, hues, bottom),
            *(_front(places.values()) if front else ()),
            *(part for row in shown for part in _dot(row, across, upwards, x_axis, y_axis, hue=hues[row.name])),
        ],
    )


def _front(places: Iterable[tuple[float, float]]) -> Iterator[str]:
    """The line through the dots that none lies to the left of and below; pixels grow downwards."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (place[0], -place[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    if len(kept) > 1:
        yield _path(kept, "front")


def rate_curves(rows: Sequence[Row]) -> str:
    """The picture of held-out loss over forgetting, a line a variant along its learning rates; empty without a grid.

    A rate that was tuned on loss alone says little about retention: variants are compared where their lines pass.
    """
    lines = {row.name: _along_rates(row) for row in rows}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    height = max(300.0, TOP + NAME_GAP * len(lines) + 60)
    bottom = height - 48
    xs, ys = ([point[at] for points in lines.values() for point in points] for at in (1, 2))
    x_axis = _axis([Spread((x,)) for x in xs], LEFT, RIGHT)
    y_axis = _axis([Spread((y,)) for y in ys], bottom, TOP)
    at = {name: [(x_axis.at(x), y_axis.at(y)) for _, x, y in points] for name, points in lines.items()}
    hues = {name: f"hue{index % N_HUES}" for index, name in enumerate(at)}
    said = "; ".join(
        f"{name}: " + ", ".join(f"lr {lr:g} forgetting {x:.4f} loss {y:.4f}" for lr, x, y in points)
        for name, points in lines.items()
    )
    dotted = (
        f'<circle class="dot {hues[name]}" cx="{number(x)}" cy="{number(y)}" r="3"/>' for name in at for x, y in at[name]
    )
    return _svg(
        "held-out loss over forgetting along the learning rates",
        said,
        height,
        [
            *_grid(x_axis, y_axis, bottom),
            _text((LEFT + RIGHT) / 2, bottom + 38, FIGURES["forgetting"].heading, anchor="middle", kind="soft"),
            _text(4, TOP - 12, FIGURES["eval_loss"].heading, kind="soft"),
            *_names({name: points[-1] for name, points in at.items()}, hues, bottom),
            *(_path(points, f"lead {hues[name]}") for name, points in at.items()),
            *dotted,
        ],
    )


def _along_rates(row: Row) -> list[tuple[float, float, float]]:
    """The (learning rate, forgetting, held-out loss) of a variant's tuning runs that have both, by rising rate."""
    found = []
    for outcome in row.tuning:
        x, y = ((outcome.figures or {}).get(name) for name in ("forgetting", "eval_loss"))
        if x is not None and y is not None:
            found.append((outcome.cell.lr, x, y))
    return sorted(found)


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{number(x)},{number(y)}" for x, y in points)}"/>'


def _bytes(figure: str) -> bool:
    return FIGURES[figure].digits is None


def _axis_name(figure: str, unit: float) -> str:
    unit_name = (", MiB" if unit == MIB else ", GiB") if _bytes(figure) else ""
    return f"{FIGURES[figure].heading}{unit_name}"


def _said(row: Row, *figures: str) -> str:
    return f"{row.name}: " + ", ".join(
        f"{FIGURES[name].heading} {row.spread(name).text(FIGURES[name])}" for name in figures
    )


def _grid(x_axis: _Axis, y_axis: _Axis, bottom: float) -> Iterator[str]:
    for y, words in y_axis.ticks(6):
        yield _line(LEFT, y, RIGHT, y, "grid")
        yield _text(LEFT - 8, y + 4, words, anchor="end")
    for x, words in x_axis.ticks(5):
        yield _line(x, TOP, x, bottom, "grid")
        yield _text(x, bottom + 18, words, anchor="middle")
    yield _line(LEFT, bottom, RIGHT, bottom, "axis")
    yield _line(LEFT, TOP, LEFT, bottom, "axis")


def _from_above(dots_at: Mapping[str, tuple[float, float]]) -> list[str]:
    """The order of the names beside the plot."""
    return sorted(dots_at, key=lambda name: dots_at[name][1])


def _dot(row: Row, across: str, upwards: str, x_axis: _Axis, y_axis: _Axis, *, hue: str) -> Iterator[str]:
    over, up = row.spread(across), row.spread(upwards)
    x, y = x_axis.at(over.mean or 0), y_axis.at(up.mean or 0)
    if over.std is not None:
        yield _line(x_axis.at(_reach(over)[0]), y, x_axis.at(_reach(over)[1]), y, "whisker")
    if up.std is not None:
        yield _line(x, y_axis.at(_reach(up)[0]), x, y_axis.at(_reach(up)[1]), "whisker")
    yield (
        f'<circle class="dot {hue}" cx="{number(x)}" cy="{number(y)}" r="4.5"><title>{safe(_said(row, upwards, across))}'
        "</title></circle>"
    )


def _names(dots_at: Mapping[str, tuple[float, float]], hues: Mapping[str, str], bottom: float) -> Iterator[str]:
    """The names beside the plot, at least a line apart, in the order of the dots; a thin line leads to each dot."""
    ordered = [(name, dots_at[name]) for name in _from_above(dots_at)]
    heights: list[float] = []
    for _, (_, y) in ordered:
        heights.append(max(y, heights[-1] + NAME_GAP if heights else TOP))
    limit = bottom
    for index in reversed(range(len(heights))):  # what is pushed over the bottom goes back up
        heights[index] = min(heights[index], limit)
        limit = heights[index] - NAME_GAP
    for (name, (x, y)), height in zip(ordered, heights, strict=True):
        yield _line(x, y, NAMES_LEFT - 12, height, f"lead {hues[name]}")
        yield f'<circle class="dot {hues[name]}" cx="{number(NAMES_LEFT - 7)}" cy="{number(height)}" r="3.5"/>'
        yield _text(NAMES_LEFT + 2, height + 4, _short(name))


# --- bars -------------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Row], *, figure: str) -> str:
    """The picture of a figure, a bar a variant, from 0; empty where no variant has the figure."""
    shown = [row for row in rows if row.spread(figure).values]
    if not shown:
        return ""
    bottom = TOP + BAR_STEP * len(shown)
    axis = _axis([row.spread(figure) for row in shown], BARS_LEFT, BARS_RIGHT, zero=True)
    parts: list[str] = []
    for x, words in axis.ticks(6):
        parts += [_line(x, TOP, x, bottom, "grid"), _text(x, bottom + 18, words, anchor="middle")]
    for index, row in enumerate(shown):
        parts += _bar(row, figure, axis, TOP + BAR_STEP * (index + 0.5))
    middle = (BARS_LEFT + BARS_RIGHT) / 2
    parts.append(_line(axis.at(0), TOP, axis.at(0), bottom, "axis"))
    parts.append(_text(middle, bottom + 38, FIGURES[figure].heading, anchor="middle", kind="soft"))
    said = "; ".join(_said(row, figure) for row in shown)
    return _svg(f"{FIGURES[figure].heading} of each variant", said, bottom + 48, parts)


def _bar(row: Row, figure: str, axis: _Axis, y: float) -> Iterator[str]:
    spread = row.spread(figure)
    ends = sorted((axis.at(0), axis.at(spread.mean or 0)))
    yield _text(BARS_LEFT - 10, y + 4, _short(row.name), anchor="end")
    yield (
        f'<rect class="bar" x="{number(ends[0])}" y="{number(y - 8)}" width="{number(max(ends[1] - ends[0], 1))}" '
        f'height="16"><title>{safe(_said(row, figure))}</title></rect>'
    )
    if spread.std is not None:
        low, high = (axis.at(edge) for edge in _reach(spread))
        yield _line(low, y, high, y, "whisker")
    yield _text(BARS_RIGHT + 12, y + 4, spread.text(FIGURES[figure]))


# --- elements ---------------------------------------------------------------------------------------------------------


def _short(name: str) -> str:
    """The name without its middle: variants differ at their ends.

    The whole name is in the element's title and in the table.
    """
    half = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _svg(title: str, said: str, height: float, parts: Sequence[str]) -> str:
    body, ident = "\n".join(parts), "".join(letter if letter.isalnum() else "-" for letter in title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {number(height)}" role="img" aria-labelledby="{ident}-title {ident}-said">\n'
        f'<title id="{ident}-title">{safe(title)}</title>\n<desc id="{ident}-said">{safe(said)}</desc>\n{body}\n</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{safe(words)}</text>'
