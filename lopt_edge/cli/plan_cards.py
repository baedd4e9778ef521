"""`lopt-edge plan --gpu all` and `--gpu list`: the same run on every known card, and which cards are known.

The rule: each row is the answer that `--gpu NAME` gives, with the usual host memory of that kind of machine where none was
stated; nothing is interpolated. A card that does not hold the run is a row, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError
from lopt_edge.plan.facts.cards import CARDS, Card
from lopt_edge.plan.search.run_plan import RunPlan, make_run_plan
from lopt_edge.planning.duration import Duration, in_words
from lopt_edge.planning.worst_case import question
from lopt_edge.training.prepare.plan_data import PlannedData, as_values, read_data
from lopt_edge.units import format_bytes

HOST_NOTE = "each with the host memory that such a machine usually has, where --host-memory states none"
HOW = "weights, activations"
PLANNED = ("laptop", "desktop")  # kinds of cards that `all` asks for


def list_cards(out: Console, *, as_json: bool) -> None:
    """Show which cards are known."""
    if as_json:
        values = [{"name": card.name, "kind": card.kind, "memory_bytes": card.memory_bytes} for card in _cards()]
        print(json.dumps(values, indent=2))
    else:
        out.print(_names(_cards()), soft_wrap=False)


def _cards() -> list[Card]:
    return sorted(CARDS.values(), key=lambda card: (card.memory_bytes, card.memory_bandwidth))


def cards_page(config: Config, out: Console, *, as_json: bool, beside: Sequence[object]) -> bool:
    """Show the table; returns whether any card holds the run. Raises InputError for what cannot be beside it."""
    if any(beside):
        raise InputError("cannot be with --sweep, --timeline or --explain", where="--gpu all", fix="name one card")
    data = read_data(config)
    rows = [(card, *_answer(config, card, data)) for card in _cards() if card.kind in PLANNED]
    if as_json:
        values = [{"card": card.name, **found.as_dict(), **as_values(expected)} for card, found, expected in rows]
        print(json.dumps(values, indent=2))
    else:
        out.print(_table(rows), soft_wrap=False)
        for line in (*data.words(None), HOST_NOTE):
            out.print(line, markup=False, soft_wrap=False)
    return any(found.fits for _, found, _ in rows)


def _answer(config: Config, card: Card, data: PlannedData) -> tuple[RunPlan, Duration | None]:
    asked = question(config, gpu=card.name, largest=data.largest)
    found = make_run_plan(asked.search, asked.budget, notes=asked.notes, brief=True)
    return found, data.duration(asked, found)


def _names(cards: Sequence[Card]) -> Table:
    table = Table(title="cards that --gpu knows", title_justify="left")
    for heading in ("name", "kind", "memory"):
        table.add_column(heading, justify="right" if heading == "memory" else "left")
    for card in cards:
        table.add_row(card.name, card.kind, format_bytes(card.memory_bytes))
    return table


def _table(rows: Sequence[tuple[Card, RunPlan, Duration | None]]) -> Table:
    timed = any(expected is not None for _, _, expected in rows)
    table = Table(title_justify="left")
    for heading in ("card", "memory", "fits", "takes", "host", "tokens/s", *(["run"] if timed else []), HOW):
        table.add_column(heading, justify="left" if heading in ("card", HOW) else "right", no_wrap=heading != HOW)
    for card, found, expected in rows:
        speed = found.tokens_per_second if expected is None else expected.tokens_per_second
        cells = [card.name, format_bytes(card.memory_bytes), "[green]yes[/green]" if found.fits else "[red]NO[/red]"]
        cells += [format_bytes(found.peak_bytes["device"]), format_bytes(found.peak_bytes["host"]), f"{speed:,.0f}"]
        cells += [in_words(expected.seconds) if expected is not None else ""] if timed else []
        table.add_row(*cells, _how(found))
    return table


def _how(found: RunPlan) -> str:
    if not found.fits:
        return "; ".join(found.missing)
    return f"{found.knobs['weights']}, {found.knobs['activations']}"
