"""`lopt-edge plan`: asks the planner and shows its answer, in words, as JSON, as a sweep or as pictures.

The rule: everything shown comes from one `RunPlan` (plan/search/run_plan.py) or one per point of a sweep; this file lays
out, it computes nothing. No torch on this path: an answer does not wait for its import.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lopt_edge.cli.plan_cards import cards_page
from lopt_edge.cli.terminal import say
from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, RunError
from lopt_edge.pictures.sweep import CurvePoint, draw_curve
from lopt_edge.plan.search.pictured import predicted_picture
from lopt_edge.plan.search.run_plan import RunPlan, described, make_run_plan, summary
from lopt_edge.planning.worst_case import Question, answer, question, read_facts
from lopt_edge.system.file_systems import path_fault
from lopt_edge.training.prepare.plan_data import as_values, read_data
from lopt_edge.units import format_bytes, parse_bytes

SWEPT = ("max-seq-len", "device-memory")
CURVE_NAME = "plan-sweep.svg"
MOST_POINTS = 64
Point = tuple[str, float]  # a value as text and as a number


def plan(
    config: Config,
    out: Console,
    *,
    gpu: str | None,
    as_json: bool,
    sweep: str | None,
    picture: str | None,
    timeline: str | None,
    explain: bool,
) -> bool:
    """Show the answer; returns whether it fits (with a sweep: whether any point does). Raises InputError(s), RunError."""
    for flag, path in (("--timeline", timeline), ("--picture", picture)):
        if path is not None and (fault := path_fault(path)) is not None:
            raise InputError(fault, where=flag, fix="check the path")
    if gpu == "all":
        return cards_page(config, out, as_json=as_json, beside=(sweep, timeline, explain))
    if sweep is not None:
        return _sweep(config, out, gpu=gpu, as_json=as_json, sweep=sweep, picture=picture)
    data = read_data(config)
    asked = question(config, gpu=gpu, largest=data.largest)
    found = answer(asked)
    expected = data.duration(asked, found)
    if timeline is not None:
        _write(Path(timeline), timeline_picture(asked, found))
    if as_json:
        print(json.dumps({**found.as_dict(), **as_values(expected)}, indent=2))
    else:
        verdict, *lines = summary(found)
        out.print(verdict, markup=False, style="bold green" if found.fits else "bold red")
        for line in (*lines, *data.words(expected)):
            out.print(line, markup=False)
        out.print(items_table(found))
        out.print(knobs_table(found))
        for line in beside(found):
            out.print(line, markup=False)
    if explain:
        out.print(plan_text(asked, found), markup=False, end="")
    if timeline is not None and not as_json:
        out.print(f"picture: {timeline}", markup=False)
    return found.fits


# words -----------------------------------------------------------------------------------------------------------------


def items_table(found: RunPlan) -> Table:
    """The items of the device memory's peak, in bytes and shares."""
    table = Table(title=f"device memory at its peak ({found.peak_op})", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    total = sum(found.items.values())
    for name, n_bytes in found.items.items():
        if n_bytes:
            table.add_row(name, format_bytes(n_bytes), f"{n_bytes / total:.0%}")
    table.add_section()
    table.add_row("together", format_bytes(total), "")
    return table


def knobs_table(found: RunPlan) -> Table:
    """The memory settings of the plan, with the reason for each."""
    table = Table(title=f"knobs, the best of {found.n_combinations:,} combinations", title_justify="left")
    for heading in ("setting", "value", "why"):
        table.add_column(heading)
    for name, value in found.knobs.items():
        table.add_row(name.replace("_", "-"), str(value), found.reasons[name])
    return table


def beside(found: RunPlan) -> Iterator[str]:
    """The sentences on what else there would be, and on what the answer stands on."""
    for other in found.alternatives:
        yield f"else, {other.change} ({described(other.knobs)})"
    if found.longest_context is not None:
        yield f"longest context that fits: {found.longest_context:,} tokens"
    if found.smallest_card is not None:
        yield f"smallest consumer card that would hold a step: {found.smallest_card}"
    yield f"seconds from the profile {found.profile}"
    yield from found.notes


def plan_text(asked: Question, found: RunPlan) -> str:
    """The text of the plan for each kind of step."""
    assert found.chosen is not None
    workload = asked.search.workload
    plans = (workload.plan(found.chosen.knobs, n_micro_batches=len(workload.batches), kind=kind) for kind in workload.kinds)
    return "\n".join(plan.text() for plan in plans)


def timeline_picture(asked: Question, found: RunPlan) -> str:
    """The predicted timeline of a step as SVG."""
    assert found.chosen is not None
    prediction, workload = found.chosen.prediction, asked.search.workload
    title = f"{workload.shape.facts.architecture}, {found.method}, {workload.batches[0].n_tokens} tokens: predicted"
    return predicted_picture(prediction, title=title, budget_bytes=asked.budget.device_bytes)


# sweeps ----------------------------------------------------------------------------------------------------------------


def _sweep(config: Config, out: Console, *, gpu: str | None, as_json: bool, sweep: str, picture: str | None) -> bool:
    name, points = read_sweep(sweep)
    points, note = _within_model(config, name, points)
    found = [(text, value, _point(config, name, text, gpu=gpu)) for text, value in points]
    marks = [
        CurvePoint(
            value,
            text,
            one.fits,
            one.peak_bytes["device"],
            one.peak_bytes["host"],
            one.peak_bytes["disk"],
            one.step_seconds,
        )
        for text, value, one in found
    ]
    path = Path(picture or CURVE_NAME)
    budgets = {one.budget_bytes["device"] for _, _, one in found}
    _write(
        path,
        draw_curve(
            marks,
            title=f"{config.model}, {config.method}",
            x_name=name,
            budget_bytes=budgets.pop() if len(budgets) == 1 else None,
        ),
    )
    if as_json:
        print(json.dumps([{name: text, **one.as_dict()} for text, _, one in found], indent=2))
    else:
        rows = [(text, one) for text, _, one in found]
        out.print(_sweep_table(name, rows))
        for line in _sweep_knobs(rows):
            out.print(line, markup=False)
        out.print(f"picture: {path}", markup=False)
    if note:
        say(note)  # beside JSON, too
    return any(one.fits for *_, one in found)


def _within_model(config: Config, name: str, points: list[Point]) -> tuple[list[Point], str]:
    """The points that the model has positions for, and a sentence about the others. Raises InputError if none is left."""
    if name != SWEPT[0]:
        return points, ""
    limit = read_facts(config.model, config.revision)[0].max_positions
    inside = [point for point in points if limit is None or point[1] <= limit]
    beyond = [text for text, value in points if limit is not None and value > limit]
    if not inside:
        raise InputError(
            f"all points are beyond the model's {limit} positions", where="--sweep", fix=f"begin at {limit} or less"
        )
    return inside, f"left out, beyond the model's {limit} positions: {', '.join(beyond)}" if beyond else ""


def _point(config: Config, name: str, text: str, *, gpu: str | None) -> RunPlan:
    values = {**config.model_dump(exclude_unset=True), name.replace("-", "_"): int(text) if name == SWEPT[0] else text}
    asked = question(load_config(None, values), gpu=gpu)
    return make_run_plan(asked.search, asked.budget, notes=asked.notes, brief=True)


def _sweep_table(name: str, rows: list[tuple[str, RunPlan]]) -> Table:
    table = Table(title_justify="left")
    for heading in (name, "fits", "device", "host", "disk", "s/step", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for text, one in rows:
        peaks = (format_bytes(one.peak_bytes[tier]) for tier in ("device", "host", "disk"))
        seconds = f"{one.step_seconds:,.0f}" if one.step_seconds >= 10 else f"{one.step_seconds:.2g}"
        table.add_row(text, "yes" if one.fits else "NO", *peaks, seconds, f"{one.tokens_per_second:,.0f}")
    return table


def _sweep_knobs(rows: list[tuple[str, RunPlan]]) -> Iterator[str]:
    """A line for each run of points with the same memory settings: they would not fit beside the figures."""
    for knobs, same in groupby(rows, key=lambda row: described(row[1].knobs)):
        texts = [text for text, _ in same]
        yield f"{texts[0] if len(texts) == 1 else f'{texts[0]} to {texts[-1]}'}: {knobs}"


def read_sweep(text: str) -> tuple[str, list[Point]]:
    """The setting and its points, from `NAME=FROM..TO` (doubling) or `NAME=A,B,C`. Raises InputError."""
    name, _, values = text.partition("=")
    forms = "write e.g. max-seq-len=1k..256k, max-seq-len=512,4096 or device-memory=4GB..24GB"
    if name not in SWEPT or not values:
        raise InputError(f"{text[:60]!r} cannot be swept", where="--sweep", fix=forms)
    read = _tokens if name == SWEPT[0] else _amount
    first, dots, last = values.partition("..")
    if not dots:
        found = [read(part) for part in values.split(",")]
    else:
        (_, low), (_, high) = read(first), read(last)
        if not low <= high:
            raise InputError(f"{first} is more than {last}", where="--sweep", fix=forms)
        found = list(_doubled(low, high, tokens=name == SWEPT[0]))
    if len(found) > MOST_POINTS:
        raise InputError(f"{len(found)} points are too many", where="--sweep", fix=f"ask for at most {MOST_POINTS}")
    return name, found


def _tokens(text: str) -> Point:
    number, k = text.strip().lower().removesuffix("k"), text.strip().lower().endswith("k")
    if not number.isdigit() or not int(number) or len(number) > 9:
        raise InputError(f"{text[:40]!r} is no number of tokens", where="--sweep", fix="write 512, 4096, 16k (16 x 1024)")
    tokens = int(number) * (1024 if k else 1)
    return str(tokens), tokens


def _amount(text: str) -> Point:
    return text.strip(), parse_bytes(text, free_bytes=None, where="--sweep")


def _doubled(low: float, high: float, *, tokens: bool) -> Iterator[Point]:
    """The points from low to high: lengths double, memory grows by half an octave, so that a curve is seen."""
    value, step = low, 2.0 if tokens else 2**0.5
    while value < high * 0.999:
        yield (str(round(value)), round(value)) if tokens else (_in_words(value), value)
        value *= step
    yield (str(round(high)), round(high)) if tokens else (_in_words(high), high)


def _in_words(n_bytes: float) -> str:
    """The amount as `parse_bytes` reads it, to three places."""
    return f"{n_bytes / 1e9:.3f}".rstrip("0").rstrip(".") + "GB" if n_bytes >= 1e9 else f"{max(1, round(n_bytes / 1e6))}MB"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror or error}", where=str(path)) from None
