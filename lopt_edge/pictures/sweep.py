"""A sweep as a picture: what each tier holds at most and what a step takes, over one setting, e.g. the sequence length.

Two plots over one x axis: above, the bytes by tier with the device's budget, dashed; below, the seconds of a step. A mark
is a point that was planned, filled where it fits and hollow where it does not. The straight lines between marks lead the
eye and say nothing: between two points the planner may turn any knob. The legend shows the numbers at the point where
fitting ends or begins; every mark shows its own to whoever hovers over it.

Rules, besides those of svg.py: ticks stand at the points, with the points' own texts (a text without room is left out,
its tick is not). A linear scale begins at 0. Bytes go to a logarithmic scale where a lower tier would flatten the device's
line, seconds where they span much; the plot's heading says so. A logarithmic scale has no place for 0: a point without
bytes has no mark there, and its line starts with its first byte. A tier that never holds a byte is left out.

It draws what it is given: no bytes are computed, no plan is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lopt_edge.pictures.svg import (
    GIB,
    LEFT,
    LEGEND_LEFT,
    LEGEND_RIGHT,
    MIB,
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
    legend_row,
    linear_ticks,
    number,
    safe,
    shortened,
    text,
    tick,
)

HEIGHT = 602
BYTES_BOTTOM = 346.0
SECONDS_TOP, SECONDS_BOTTOM = 394.0, 544.0
INSET = 16.0  # px between the frame and the outermost points
FLATTENED = 3  # times the device's bytes: above that, bytes go to a logarithmic scale
SPREAD = 20  # times the fewest seconds: above that, seconds do
FARTHEST_BELOW = 16  # a budget lower than the data by that factor is not drawn on a logarithmic scale
SHORTEST = 1e-3  # a linear scale of seconds reaches at least this high
CHARACTER = 7.2  # px, more than a character of a tick's text takes
SECONDS_COLOUR = "#222222"


@dataclass(frozen=True)
class CurvePoint:
    """A run of the sweep. `x_text` is how its x is written; bytes are each tier's peak."""

    x: float
    x_text: str
    fits: bool
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    step_seconds: float

    def on(self, tier: str) -> int:
        """The peak of a tier in bytes."""
        return {"device": self.device_bytes, "host": self.host_bytes, "disk": self.disk_bytes}[tier]


@dataclass(frozen=True)
class _Line:
    """A line of the plot: a number of the points, and how it is written."""

    name: str
    colour: str
    value: Callable[[CurvePoint], float]
    words: Callable[[CurvePoint], str]


def _tier_line(tier: str) -> _Line:
    return _Line(tier, TIER_COLOURS[tier], lambda point: point.on(tier), lambda point: f"{tier} {_amount(point.on(tier))}")


def _seconds_line() -> _Line:
    return _Line(
        "seconds",
        SECONDS_COLOUR,
        lambda point: point.step_seconds,
        lambda point: f"{_seconds_text(point.step_seconds)} a step",
    )


@dataclass(frozen=True)
class _Across:
    """The x axis: the points' numbers to pixels."""

    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        low, high, at = (math.log(n) if self.log else n for n in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5  # one place only: the middle
        return LEFT + INSET + share * (RIGHT - LEFT - 2 * INSET)


@dataclass(frozen=True)
class _Up:
    """A y axis, from bytes or seconds to pixels. A logarithmic one starts somewhat below `lowest`, a linear one at 0."""

    top: float
    bottom: float
    lowest: float
    highest: float
    log: bool

    def y(self, value: float) -> float:
        if self.log:
            low, high, at = math.log(self.lowest), math.log(self.highest), math.log(value)
            share = 0.06 + 0.88 * (at - low) / (high - low)
        else:
            share = value / self.end
        return self.bottom - share * (self.bottom - self.top)

    @property
    def end(self) -> float:
        """The value at the top of a linear axis."""
        return self.highest * 1.06

    def shows(self, value: float) -> bool:
        return value > 0 or not self.log


def draw_curve(
    points: Sequence[CurvePoint], *, title: str, x_name: str, log_x: bool = True, budget_bytes: int | None = None
) -> str:
    """The SVG text of a sweep, 1000 x 602; the points may come in any order. `budget_bytes` is the device's.

    Raises ValueError where there are no points, or one cannot be drawn (no finite x, x <= 0 with `log_x`, less than 0
    bytes or seconds).
    """
    _check(points, log_x)
    points = sorted(points, key=lambda point: point.x)
    across = _Across(points[0].x, points[-1].x, log_x)
    where, edge = _edge(points)
    tiers = [tier for tier in TIER_COLOURS if tier == "device" or any(point.on(tier) for point in points)]
    up, budget_fits = _bytes_axis(points, tiers, budget_bytes)
    seconds = _seconds_axis(points)
    ticks = _ticks(points, across)
    parts = [
        *head(title, HEIGHT),
        text(LEFT, 48, f"{x_name}: {where}", most=110, fill="#555555"),
        *_frame(up, "peak bytes by tier", _bytes_ticks(up), "" if up.log else byte_unit(up.highest)[1], ticks),
        *(budget_line(up.y(budget_bytes)) if budget_bytes is not None and budget_fits else ()),
        *(part for tier in reversed(tiers) for part in _line(_tier_line(tier), points, across, up, x_name)),
        *_frame(seconds, "seconds a step", _seconds_ticks(seconds), "" if seconds.log else _time_unit(seconds.highest)[1],
                ticks),
        *_line(_seconds_line(), points, across, seconds, x_name),
        *_x_axis(ticks, x_name),
        *_legend(points, edge, tiers, budget_bytes, budget_fits),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part) + "\n"


def _check(points: Sequence[CurvePoint], log_x: bool) -> None:
    if not points:
        raise ValueError("a curve needs at least one point")
    for point in points:
        if not math.isfinite(point.x) or (log_x and point.x <= 0):
            raise ValueError(f"point {point.x_text} has no place on the x axis")
        if min(point.on(tier) for tier in TIER_COLOURS) < 0:
            raise ValueError(f"point {point.x_text} has fewer than 0 bytes")
        if not (math.isfinite(point.step_seconds) and point.step_seconds >= 0):
            raise ValueError(f"point {point.x_text} takes {point.step_seconds} seconds")


def _edge(points: Sequence[CurvePoint]) -> tuple[str, tuple[CurvePoint, str]]:
    """The sentence where it fits; and the point that the legend is about, with what it is."""
    fits = [point.fits for point in points]
    changes = [index for index in range(1, len(points)) if fits[index] != fits[index - 1]]
    if not changes and fits[0]:
        return "every point fits" if len(points) > 1 else "fits", (points[-1], "")
    if not changes:
        return "no point fits" if len(points) > 1 else "does not fit", (points[0], "which does not fit")
    before, after = points[changes[0] - 1], points[changes[0]]
    if len(changes) == 1 and before.fits:
        return f"fits up to {_x_text(before)}, not at {_x_text(after)}", (before, "the last that fits")
    if len(changes) == 1:
        return f"fits from {_x_text(after)} on, not at {_x_text(before)}", (after, "the first that fits")
    last = max((point for point in points if point.fits), key=lambda point: point.x)
    return f"{sum(fits)} of {len(points)} points fit", (last, "the last that fits")


def _x_text(point: CurvePoint) -> str:
    return shortened(point.x_text, 10)


# --- scales -----------------------------------------------------------------------------------------------------------


def _bytes_axis(points: Sequence[CurvePoint], tiers: Sequence[str], budget_bytes: int | None) -> tuple[_Up, bool]:
    """The axis, and whether it has a place for the budget."""
    amounts = [point.on(tier) for tier in tiers for point in points]
    lowest, highest = min((n_bytes for n_bytes in amounts if n_bytes), default=1), max(*amounts, 1)
    device = max(point.device_bytes for point in points)
    log = device > 0 and highest > FLATTENED * device
    if budget_bytes is None or not is_drawn(budget_bytes, highest) or (log and budget_bytes * FARTHEST_BELOW < lowest):
        return _Up(TOP, BYTES_BOTTOM, lowest, highest, log), False
    return _Up(TOP, BYTES_BOTTOM, min(lowest, budget_bytes), max(highest, budget_bytes), log), True


def _seconds_axis(points: Sequence[CurvePoint]) -> _Up:
    taken = [point.step_seconds for point in points]
    log = min(taken) > 0 and max(taken) / SPREAD > min(taken)
    return _Up(SECONDS_TOP, SECONDS_BOTTOM, min(taken), max(taken) if log else max(*taken, SHORTEST), log)


def _bytes_ticks(up: _Up) -> Iterator[tuple[float, str]]:
    """The ticks of the bytes axis; on a logarithmic one powers of two, each with its unit."""
    if not up.log:
        return linear_ticks(up.y, up.end, byte_unit(up.highest)[0], 6)
    low, high = math.ceil(math.log2(up.lowest)), math.floor(math.log2(up.highest))
    step = next(step for step in (1, 2, 5, 10, 20, 50) if (high - low) // step < 7)
    first = -(-low // step) * step
    return ((up.y(2.0**power), _power_text(power)) for power in range(first, high + 1, step))


def _power_text(power: int) -> str:
    """The text of 2 ** power bytes."""
    unit = min(power // 10, 5)
    return f"{1 << (power - 10 * unit):,} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[unit]}"


def _seconds_ticks(up: _Up) -> Iterator[tuple[float, str]]:
    """The ticks of the seconds axis; on a logarithmic one 1, 2, 5, 10, ... seconds, or powers of ten, or some of them."""
    if not up.log:
        return linear_ticks(up.y, up.end, _time_unit(up.highest)[0], 4)
    low, high = math.floor(math.log10(up.lowest)), math.ceil(math.log10(up.highest))
    every = (10.0**power * factor for power in range(low, high + 1) for factor in (1, 2, 5))
    some = [value for value in every if up.lowest <= value <= up.highest]
    if len(some) > 7:
        step = math.ceil((high - low) / 7)
        tens = (10.0**power for power in range(low, high + 1, step))
        some = [value for value in tens if up.lowest <= value <= up.highest]
    return ((up.y(value), f"{_plain(value)} s") for value in some)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e6 else f"{value:g}"


def _time_unit(highest: float) -> tuple[float, str]:
    """The unit of an axis that reaches so high: (seconds in it, its name)."""
    return (1.0, "s") if highest < 300 else (60.0, "min") if highest < 3 * 3600 else (3600.0, "h")


def _seconds_text(seconds: float) -> str:
    unit, name = _time_unit(seconds)
    amount = seconds / unit
    return f"{amount:,.0f} {name}" if amount >= 100 else f"{amount:.3g} {name}"


# --- the plots --------------------------------------------------------------------------------------------------------


def _ticks(points: Sequence[CurvePoint], across: _Across) -> list[tuple[float, str]]:
    """The (x, text) of the points; a text that would touch its neighbour or the last one is empty."""
    found = []
    last = across.x(points[-1].x)
    last_left = last - len(_x_text(points[-1])) * CHARACTER / 2
    taken = -math.inf  # up to where there is text
    for index, point in enumerate(points):
        x, half = across.x(point.x), len(_x_text(point)) * CHARACTER / 2
        room = x - half > taken and (index == len(points) - 1 or x + half + CHARACTER < last_left)
        found.append((x, _x_text(point) if room else ""))
        taken = x + half + CHARACTER if room else taken
    return found


def _frame(
    up: _Up, heading: str, heights: Iterator[tuple[float, str]], unit: str, ticks: Sequence[tuple[float, str]]
) -> Iterator[str]:
    """The grid, upright lines at the points that have a text, the heading, the axis."""
    yield from grid(heights)
    for x in (x for x, words in ticks if words):
        place = f'x1="{number(x)}" x2="{number(x)}" y1="{number(up.top)}" y2="{number(up.bottom)}"'
        yield f'<line {place} stroke="#eeeeee"/>'
    yield text(LEFT - 8, up.top - 8, unit, anchor="end", fill="#555555")
    yield text(LEFT, up.top - 8, f"{heading}, logarithmic scale" if up.log else heading, fill="#555555")
    yield axis_line(up.bottom)
    for x, _ in ticks:
        yield tick(x, up.bottom)


def _x_axis(ticks: Sequence[tuple[float, str]], x_name: str) -> Iterator[str]:
    for x, words in ticks:
        yield text(x, SECONDS_BOTTOM + 19, words, anchor="middle")
    yield text((LEFT + RIGHT) / 2, SECONDS_BOTTOM + 40, x_name, anchor="middle", fill="#555555")


def _line(line: _Line, points: Sequence[CurvePoint], across: _Across, up: _Up, x_name: str) -> Iterator[str]:
    """A group: straight lines from point to point, with gaps where the scale has no place, and the marks on top."""
    path, marks, apart = "", [], True
    for point in points:
        value = line.value(point)
        if up.shows(value):
            x, y = across.x(point.x), up.y(value)
            path += f"{'M' if apart else 'L'}{number(x)},{number(y)}"
            told = f"{x_name} {_x_text(point)}: {line.words(point)}{'' if point.fits else ', does not fit'}"
            marks.append(_mark(line.name, x, y, filled=point.fits, told=told))
        apart = not up.shows(value)
    yield f'<g id="{line.name}" {_ink(line.colour)}>'
    yield f'<path fill="none" d="{path}"/>' if path else ""
    yield from marks
    yield "</g>"


def _ink(colour: str) -> str:
    return f'stroke="{colour}" stroke-width="1.6" fill="{colour}"'


def _mark(name: str, x: float, y: float, *, filled: bool, told: str = "") -> str:
    """The mark of a point: a shape a tier, so that they can be told apart without colour, too: disc, square, triangle."""
    look = "" if filled else ' fill="#ffffff"'
    inside = f"<title>{safe(told)}</title>" if told else ""
    if name == "host":
        return f'<rect x="{number(x - 3.5)}" y="{number(y - 3.5)}" width="7" height="7"{look}>{inside}</rect>'
    if name == "disk":
        return f'<path d="M{number(x)},{number(y - 4.5)}l4.5,8h-9z"{look}>{inside}</path>'
    return f'<circle cx="{number(x)}" cy="{number(y)}" r="4"{look}>{inside}</circle>'


# --- the legend -------------------------------------------------------------------------------------------------------


def _legend(
    points: Sequence[CurvePoint],
    edge: tuple[CurvePoint, str],
    tiers: Sequence[str],
    budget_bytes: int | None,
    budget_fits: bool,
) -> Iterator[str]:
    """The legend: the numbers at one point, the budget, the hollow mark."""
    point, what = edge
    at = f"at {_x_text(point)}{', ' if what else ''}{what}"
    y = TOP + 4
    yield text(LEGEND_LEFT, y, at, most=36, weight="bold")
    for tier in tiers:
        y += 22
        yield from _legend_mark(y, tier, TIER_COLOURS[tier])
        yield from legend_row(y, tier, _amount(point.on(tier)))
    y += 12
    yield f'<line x1="{LEGEND_LEFT}" x2="{LEGEND_RIGHT}" y1="{number(y)}" y2="{number(y)}" stroke="#aaaaaa"/>'
    if budget_bytes is not None:
        y += 20
        note = "" if budget_fits else "outside this picture"
        yield from legend_budget(y, _amount(budget_bytes), note)
        y += 16 * bool(note)
    if not all(one.fits for one in points):
        y += 20
        yield from _legend_mark(y, "seconds", "#777777", filled=False)
        yield from legend_row(y, "does not fit", "")
    y = SECONDS_TOP + 4
    yield from _legend_mark(y, "seconds", SECONDS_COLOUR)
    yield from legend_row(y, "a step", _seconds_text(point.step_seconds))


def _legend_mark(y: float, name: str, colour: str, *, filled: bool = True) -> Iterator[str]:
    yield f"<g {_ink(colour)}>"
    yield f'<line x1="{LEGEND_LEFT}" x2="{LEGEND_LEFT + 15}" y1="{number(y - 4)}" y2="{number(y - 4)}"/>'
    yield _mark(name, LEGEND_LEFT + 7.5, y - 4, filled=filled)
    yield "</g>"


def _amount(n_bytes: int) -> str:
    """The bytes in their own unit, whatever the axis, for the figures of one column differ much."""
    return bytes_text(n_bytes, GIB if n_bytes >= GIB else MIB) if n_bytes else "0"
