"""Curves over the steps of a run, as inline SVG for a page (html.py): loss, evaluation, learning rate, memory.

Rules, as for the other pictures: a number that is shown is a number that was given, words are above or below the plot, and
the axis of a loss begins where its data do (a curve is read by its shape). Hues are those of the page's style sheet, so
they follow its light or dark scheme. The numbers' ends are in the description, for those who do not see the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lopt_edge.pictures.svg import number, round_step, safe

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62.0, 626.0, 34.0, 222.0
MARGIN = 0.06  # of the data's span, above and below
MOST_DOTS = 40  # points of a series that are marked one by one
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve: its name, its (step, value) points, its hue, and whether it is drawn faintly (single steps)."""

    name: str
    points: Sequence[Point]
    hue: int = 0
    faint: bool = False


def curves(series: Sequence[Series], *, title: str, limit: float | None = None, zero: bool = False) -> str:
    """The picture; empty where no series has a point. `limit`: a dashed line; `zero`: the axis begins at 0."""
    shown = [one for one in series if one.points]
    if not shown:
        return ""
    values = [y for one in shown for _, y in one.points] + ([limit] if limit is not None else []) + ([0.0] if zero else [])
    steps = [x for one in shown for x, _ in one.points]
    low, high = min(values), max(values)
    room = (high - low) * MARGIN or abs(high) * 0.05 or 1.0
    low, high = (low if zero and low == 0 else low - room), high + room
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - first) / (last - first) * (RIGHT - LEFT),
            BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP),
        )

    parts = [
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(title)}">',
        f"<title>{safe(title)}</title><desc>{safe(_described(shown))}</desc>",
        *_legend(shown),
        *_grid(low, high, lambda y: at(first, y)[1]),
        *_steps(first, last, lambda x: at(x, low)[0]),
    ]
    if limit is not None:
        y = number(at(first, limit)[1])
        parts.append(f'<line class="limit" x1="{number(LEFT)}" x2="{number(RIGHT)}" y1="{y}" y2="{y}"/>')
    for one in shown:
        places = [at(x, y) for x, y in one.points]
        path = " ".join(f"{number(x)},{number(y)}" for x, y in places)
        kind = "faint" if one.faint else "line"
        parts.append(f'<g class="hue{one.hue}"><polyline class="{kind}" points="{path}"/>')
        if len(places) <= MOST_DOTS and not one.faint:
            parts += [f'<circle cx="{number(x)}" cy="{number(y)}" r="2.6"/>' for x, y in places]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _described(shown: Sequence[Series]) -> str:
    """The ends of each curve in words."""
    texts = []
    for one in shown:
        (x0, y0), (x1, y1) = one.points[0], one.points[-1]
        texts.append(f"{one.name}: {y0:.4g} at step {x0:g}, {y1:.4g} at step {x1:g}")
    return "; ".join(texts)


def _legend(shown: Sequence[Series]) -> Iterator[str]:
    x = LEFT
    for one in shown:
        kind, ends = "faint" if one.faint else "line", f'x1="{number(x)}" x2="{number(x + 18)}" y1="14" y2="14"'
        yield f'<g class="hue{one.hue}"><line class="{kind}" {ends}/></g>'
        yield f'<text x="{number(x + 24)}" y="18">{safe(one.name)}</text>'
        x += 48 + 7 * len(one.name)


def _grid(low: float, high: float, y_of: Callable[[float], float]) -> Iterator[str]:
    step = round_step(high - low, 5)
    decimals = next(count for count in range(14) if math.isclose(step, round(step, count), rel_tol=1e-9))
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        y = number(y_of(index * step))
        value = index * step
        text = f"{value:.0e}".replace("e-0", "e-") if step < 1e-4 and value else f"{value:,.{decimals}f}"
        yield f'<line class="grid" x1="{number(LEFT)}" x2="{number(RIGHT)}" y1="{y}" y2="{y}"/>'
        yield f'<text class="soft" x="{number(LEFT - 8)}" y="{y}" dy="4" text-anchor="end">{text}</text>'


def _steps(first: float, last: float, x_of: Callable[[float], float]) -> Iterator[str]:
    yield f'<line class="axis" x1="{number(LEFT)}" x2="{number(RIGHT)}" y1="{number(BOTTOM)}" y2="{number(BOTTOM)}"/>'
    step = max(1.0, round_step(last - first, 6))
    for index in range(math.ceil(first / step), math.floor(last / step) + 1):
        x = number(x_of(index * step))
        yield f'<text class="soft" x="{x}" y="{number(BOTTOM + 18)}" text-anchor="middle">{index * step:,.0f}</text>'
    yield f'<text class="soft" x="{number(RIGHT)}" y="{number(BOTTOM + 34)}" text-anchor="end">step</text>'
