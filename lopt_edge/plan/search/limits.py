"""How far a budget reaches: the longest context that fits, the smallest card that would do, the nearest settings that fit.

All three ask the prediction with the combinations of the least memory; each says what was really predicted to fit, no
extrapolation. The longest context is found to 1/64 of itself; where a tier below the device has a budget, too, the lower
bounds say which combinations to look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import inf
from typing import Any

from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.cards import CARDS, Card
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.schedule.knobs import TOKEN_TILES, Knobs, mlp_blocks
from lopt_edge.plan.search.bounds import Bounds
from lopt_edge.plan.search.search import QUARTERS, Candidate, Search, last_layers
from lopt_edge.plan.search.workload import Workload
from lopt_edge.units import format_bytes

SHORTEST, LONGEST = 16, 1 << 22  # tokens
PRECISION = 64
SMALL_RANK = 8
N_LOOKED = 4  # combinations of the most room by their bounds that are looked at


def longest_context(search: Search, budget: Budget) -> int:
    """The length in tokens of the longest sequences of which a step fits; 0 if none does."""
    workload, limited = search.workload, budget.host_bytes is not None or budget.disk_bytes is not None
    forms = frugal(search, limited=limited)

    def room(n_tokens: int) -> float:
        """Of the tier with the least room, as a share of its budget, in a combination that fits; negative if none does."""
        longer, most = workload.with_tokens(n_tokens), -inf
        for knobs in _roomiest(longer, forms, budget):
            most = max(most, _room(longer.predict(knobs), budget))
            if most >= 0:
                break
        return most

    low, high = 0, workload.batches[0].n_tokens
    room_low = room_high = room(high)
    while room_high >= 0 and high < LONGEST:
        low, room_low, high = high, room_high, high * 2
        room_high = room(high)
    while low == 0 and high > SHORTEST:  # already too long
        half = max(SHORTEST, high // 2)
        room_half = room(half)
        if room_half >= 0:
            low, room_low = half, room_half
            break
        high, room_high = half, room_half
        if half == SHORTEST:
            return 0
    while high - low > max(1, low // PRECISION):
        guess = low + (high - low) * room_low / (room_low - room_high)  # bytes are nearly linear in tokens
        step = max(1, (high - low) // 16)
        middle = min(max(round(guess) - max(1, low // (4 * PRECISION)), low + step), high - step)
        room_middle = room(middle)
        if room_middle >= 0:
            low, room_low = middle, room_middle
        else:
            high, room_high = middle, room_middle
    return low


def _room(found: Prediction, budget: Budget) -> float:
    tiers = ((found.device_bytes, budget.device_bytes), (found.host_bytes, budget.host_bytes),
             (found.disk_bytes, budget.disk_bytes))  # fmt: skip
    return min((limit - need) / limit for need, limit in tiers if limit is not None)


def _roomiest(workload: Workload, forms: list[Knobs], budget: Budget) -> list[Knobs]:
    if len(forms) <= N_LOOKED:
        return forms
    bounds = Bounds(workload)

    def most(knobs: Knobs) -> float:
        tiers = ((bounds.device_bytes(knobs), budget.device_bytes), (bounds.host_bytes(knobs), budget.host_bytes),
                 (bounds.disk_bytes(knobs), budget.disk_bytes))  # fmt: skip
        return max(need / limit for need, limit in tiers if limit is not None)

    return sorted(forms, key=most)[:N_LOOKED]


def frugal(search: Search, *, limited: bool) -> list[Knobs]:
    """The combinations of little memory: the smallest as found, and everything below with recomputation. `limited`: tiers
    below the device have budgets, so that some things may have to stay on it."""
    knobs, fixed, space = search.smallest.knobs, search.space.fixed, search.space
    below = "host" if kind_of(space.device_type).has_host_tier else "disk"
    n_layers = space.facts.n_layers
    wanted: dict[str, Any] = {
        "weights": (below,) * n_layers, "activations": ("recompute",) * n_layers, "saved_inputs": below, "states": below,
        "gradients": below, "head": "disk", "prefetch": 0, "token_tile": TOKEN_TILES[-1],
        "mlp_block": mlp_blocks(space.facts, space.device_type)[-1],
    }  # fmt: skip
    low = replace(knobs, **{name: value for name, value in wanted.items() if name not in fixed})
    if not limited:
        return list(dict.fromkeys([knobs, low]))
    axes: dict[str, list[Any]] = {
        "weights": [last_layers(n_layers, quarter, below, "resident") for quarter in QUARTERS[::-1]],
        "activations": [wanted["activations"], ("page",) * n_layers],
        "saved_inputs": [below, "device"],
        "states": [below, "device"],
        "gradients": [below, "device"],
    }
    axes = {name: values for name, values in axes.items() if name not in fixed}
    found = [replace(low, **dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    return list(dict.fromkeys(form for each in (knobs, *found) for form in (each, *space.lowered(each))))


def smallest_card(smallest: Candidate, kinds: tuple[str, ...]) -> str | None:
    """The name of the card with the least memory in which this candidate fits; None if none does, or no kind was named."""
    need = smallest.prediction.device_bytes
    enough = [card for card in CARDS.values() if card.kind in kinds and card.memory_bytes >= need]
    return min(enough, key=_size, default=_NO_CARD).name or None


def _size(card: Card) -> tuple[int, float]:
    return card.memory_bytes, card.bf16_flops


_NO_CARD = Card("", 0, 0, 0, 0, 0, False, "desktop", "")


def nearest_that_fit(search: Search, budget: Budget) -> Iterator[str]:
    """The changes of the run each of which alone makes its smallest combination fit, as flags."""
    workload, knobs = search.workload, search.smallest.knobs
    first = workload.batches[0]
    if (longest := longest_context(search, budget) if budget.device_bytes else 0) >= SHORTEST and longest < first.n_tokens:
        yield f"--max-seq-len {longest}"
    together = max(1, first.scored)
    if first.n_sequences > together:
        n_each, n_batches = first.n_sequences // together, len(workload.batches)
        single = MicroBatchSize(together, first.n_tokens, first.n_supervised // n_each, scored=first.scored)
        if _fits(replace(workload, batches=(single,) * (n_each * n_batches)), knobs, budget):
            yield f"--batch-size 1 --grad-accum {n_each * n_batches}"
    smaller = workload.course.smaller
    if smaller is not None and _fits(replace(workload, course=smaller), knobs, budget):
        yield f"--method {smaller.method}"
    small = replace(workload, shape=replace(workload.shape, rank=min(SMALL_RANK, workload.shape.rank)))
    if small != workload and _fits(small, knobs, budget):
        yield f"--lora-r {SMALL_RANK}"
    if knobs.optimizer == "adamw" and _fits(workload, replace(knobs, optimizer="adamw8bit"), budget):
        yield "--optimizer adamw8bit"
    need = search.smallest.prediction
    tiers = (("device", need.device_bytes, budget.device_bytes), ("host", need.host_bytes, budget.host_bytes),
             ("disk", need.disk_bytes, budget.disk_bytes))  # fmt: skip
    short = [(name, n_bytes) for name, n_bytes, limit in tiers if limit is not None and n_bytes > limit]
    yield " ".join(f"--{name}-memory {-(-n_bytes // 10**6)}MB ({format_bytes(n_bytes)})" for name, n_bytes in short)


def _fits(workload: Workload, knobs: Knobs, budget: Budget) -> bool:
    return workload.predict(knobs).fits(budget)
