"""The budget search: of all combinations of knobs, the fastest predicted one whose predicted peaks fit the budgets.

Branch and bound. The combinations and their order depend on the run only, never on the budgets: so the search is
deterministic, and a larger budget never gives a slower plan (what fitted still fits; seconds count in three digits). Each
combination has a lower bound of its seconds (arithmetic, or one channel's movements) and of its device bytes (what is
steady, and where a segment turns round). They are taken in the order of that bound, and the walk ends where no later one
can be faster than the best that fits. Only what passes the bounds is arranged, timed and replayed exactly. Smaller blocks
of the MLP, which are never faster, are tried where a combination does not fit, and then smaller tiles of the loss, if that
is its peak.

How near the optimum: layers are streamed from the end of the depth in quarters, graphs kept from the end in quarters, each
other thing on one tier. tests/plan/search/test_search.py compares with all per-layer choices on small models and states the
gap.

It reads no settings and asks no device: candidates' fixed knobs, budget and workload are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.plan.costs.seconds import StepSeconds
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.knobs import TOKEN_TILES, Knobs, Tier, default_knobs, mlp_blocks
from lopt_edge.plan.search.bounds import Bounds
from lopt_edge.plan.search.workload import Workload

QUARTERS = (0, 1, 2, 3, 4)
PREFETCH = (1, 0, 2)


@dataclass(frozen=True)
class Candidate:
    """A combination of knobs that was timed and replayed."""

    knobs: Knobs
    seconds: StepSeconds
    prediction: Prediction


@dataclass(frozen=True)
class Found:
    """The result of a search within a budget. `best` is None if nothing fits."""

    best: Candidate | None
    n_combinations: int


@dataclass(frozen=True)
class Space:
    """The combinations that the search may choose. `fixed` knobs do not vary; `said` are those that the user set.

    Iterating gives those whose things lie on the first tier below the device where they leave it, with the largest block of
    the MLP and tile of the loss. `lowered` gives a combination's further forms, with ever more of it on disk: what is moved
    least often goes first. `blocked` gives those with smaller blocks, `tiled` those with smaller tiles.
    """

    facts: ModelFacts
    device_type: str
    fixed: dict[str, Any]
    said: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[Knobs]:
        n_layers = self.facts.n_layers
        start = replace(default_knobs(self.facts, self.device_type), mlp_block=mlp_blocks(self.facts, self.device_type)[0])
        host_is_below = kind_of(self.device_type).host_is_below
        below: Tier = "host" if kind_of(self.device_type).has_host_tier else "disk"
        axes: dict[str, Sequence[Any]] = {
            "weights": [last_layers(n_layers, quarter, below, "resident") for quarter in QUARTERS],
            "activations": [
                last_layers(n_layers, quarter, "keep", rest) for rest in ("recompute", "page") for quarter in QUARTERS[::-1]
            ],
            "saved_inputs": ["device", below],
            "states": ["device", below],
            "gradients": ["device", below],
            "head": ["resident", "disk"] if host_is_below else [start.head],
            "prefetch": PREFETCH,
        }
        axes = {name: [self.fixed[name]] if name in self.fixed else values for name, values in axes.items()}
        others = {name: value for name, value in self.fixed.items() if name not in axes}
        combined = (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
        found = (replace(start, pages=below, **values, **others) for values in combined)
        return iter(dict.fromkeys(knobs for knobs in found if not self._wasteful(knobs)))

    def _wasteful(self, knobs: Knobs) -> bool:
        """Whether a knob has no effect (another combination gives the same plan)."""
        moves = knobs.ring or knobs.tiers
        wasted = {
            "saved_inputs": "recompute" not in knobs.activations and knobs.saved_inputs != "device",
            "gradients": knobs.apply == "layer" and knobs.gradients != "device",
            "prefetch": not moves and knobs.prefetch != PREFETCH[0],
        }
        return any(found and name not in self.fixed for name, found in wasted.items())

    def blocked(self, knobs: Knobs) -> tuple[Knobs, ...]:
        """The combination itself, then with ever smaller blocks of the MLP."""
        sizes = () if "mlp_block" in self.fixed else mlp_blocks(self.facts, self.device_type)
        return knobs, *(replace(knobs, mlp_block=size) for size in sizes if size < knobs.mlp_block)

    def tiled(self, knobs: Knobs) -> tuple[Knobs, ...]:
        """The combination itself, then with ever smaller tiles of the loss."""
        smaller = () if "token_tile" in self.fixed else TOKEN_TILES[TOKEN_TILES.index(knobs.token_tile) + 1 :]
        return knobs, *(replace(knobs, token_tile=tile) for tile in smaller)

    def with_smallest_tile(self, knobs: Knobs) -> Knobs:
        """The last of `tiled`."""
        return knobs if "token_tile" in self.fixed else replace(knobs, token_tile=TOKEN_TILES[-1])

    def lowered(self, knobs: Knobs) -> Iterator[Knobs]:
        """The combination's further forms, with ever more of it on disk; it itself is not among them."""
        for name in ("states", "gradients", "saved_inputs", "weights"):
            if name in self.fixed:
                continue
            if name == "weights":
                changed = replace(knobs, weights=tuple("disk" if w == "host" else w for w in knobs.weights))
            elif name == "saved_inputs":
                inputs: Tier = "disk" if knobs.saved_inputs == "host" else knobs.saved_inputs
                changed = replace(knobs, saved_inputs=inputs, pages="disk")
            else:
                values: dict[str, Any] = {name: "disk"} if getattr(knobs, name) == "host" else {}
                changed = replace(knobs, **values)
            if changed != knobs:
                knobs = changed
                yield knobs


def last_layers(n_layers: int, quarter: int, choice: str, rest: str) -> tuple[str, ...]:
    """The choice of each layer: `choice` for the last quarters of the depth, `rest` before them."""
    n_chosen = -(-n_layers * quarter // 4)
    return (rest,) * (n_layers - n_chosen) + (choice,) * n_chosen


class Search:
    """The combinations of one workload with their bounds; asked for several budgets, nothing is computed twice."""

    def __init__(self, workload: Workload, space: Space) -> None:
        self.workload, self.space = workload, space
        self.bounds = Bounds(workload)
        self._bytes: dict[int, int] = {}
        self._timed: dict[Knobs, StepSeconds] = {}
        self._predicted: dict[Knobs, Prediction] = {}
        self._found: dict[Budget, Found] = {}

    @cached_property
    def rows(self) -> list[tuple[float, int, Knobs]]:
        """The combinations in the order of their bound of seconds: the bound, the place in the space, and the knobs."""
        rows = [(three_digits(self.bounds.seconds(knobs)), order, knobs) for order, knobs in enumerate(self.space)]
        return sorted(rows, key=lambda row: row[:2])

    def candidate(self, knobs: Knobs) -> Candidate:
        """The combination, timed and replayed."""
        return Candidate(knobs, self.seconds(knobs), self.prediction(knobs))

    def seconds(self, knobs: Knobs) -> StepSeconds:
        """The time of a step with these knobs, computed once."""
        if knobs not in self._timed:
            self._timed[knobs] = self.workload.seconds(knobs)
        return self._timed[knobs]

    def prediction(self, knobs: Knobs) -> Prediction:
        """The peaks of a step with these knobs, replayed once."""
        if knobs not in self._predicted:
            self._predicted[knobs] = self.workload.predict(knobs)
        return self._predicted[knobs]

    def fitting(self, knobs: Knobs, budget: Budget, best: Candidate | None = None) -> Candidate | None:
        """The first form of a combination that fits, None if none does: with the largest tile that the device holds, and as
        it is, or with more of it on disk (which frees the host alone, and is slower). None, too, as soon as a form is no
        faster than `best`: then the further ones are not."""
        if not self._may_win(knobs, budget, best):
            return None
        held = self._held(knobs, budget.device_bytes)
        for form in () if held is None else self._forms(held, budget):
            if self._is_slower(form, best):
                return None
            if self.prediction(form).fits(budget):
                return self.candidate(form)
        return None

    def _held(self, knobs: Knobs, most: int | None) -> Knobs | None:
        """The fastest form of a combination that the device holds. Most combinations are refused, so the block of the least
        bytes is looked at first: where it is not held, only a smaller tile may help."""
        least = self._least(knobs)
        forms = self.space.blocked(knobs) if self._is_held(least, most) else self._tiles(least)
        return next((form for form in forms if self._is_held(form, most)), None)

    def _least(self, knobs: Knobs) -> Knobs:
        return min(self.space.blocked(knobs), key=self.bounds.device_bytes)

    def _least_bytes(self, order: int, knobs: Knobs) -> int:
        """The bound of a row's device bytes in its smallest form. Where much fits the walk asks for that of few rows."""
        if order not in self._bytes:
            self._bytes[order] = self.bounds.device_bytes(self.space.with_smallest_tile(self._least(knobs)))
        return self._bytes[order]

    def _is_held(self, form: Knobs, most: int | None) -> bool:
        """Whether the device holds a form; the bound is asked first, since it is cheaper."""
        return most is None or (self.bounds.device_bytes(form) <= most and self.prediction(form).device_bytes <= most)

    def _forms(self, knobs: Knobs, budget: Budget) -> Iterator[Knobs]:
        """The combination as it is, and with ever more of it on disk, as far as the host may hold it by its bound."""
        forms = (knobs, *self.space.lowered(knobs)) if "host" in (*knobs.weights, *knobs.tiers) else (knobs,)
        limit = budget.host_bytes
        return (form for form in forms if limit is None or self.bounds.host_bytes(form) <= limit)

    def _may_win(self, knobs: Knobs, budget: Budget, best: Candidate | None) -> bool:
        """Whether the first form that the host may hold is faster than the best: smaller tiles and more on disk are not
        faster than it. Nothing is replayed to find out."""
        form = next(self._forms(knobs, budget), None)
        return form is not None and not self._is_slower(form, best)

    def _tiles(self, knobs: Knobs) -> Iterator[Knobs]:
        """The combination itself, and with smaller tiles as long as the loss or the evaluation is at the peak."""
        for form in self.space.tiled(knobs):
            yield form
            if form.token_tile != TOKEN_TILES[-1] and not self.prediction(form).at_loss:
                break

    def _is_slower(self, knobs: Knobs, best: Candidate | None) -> bool:
        """Whether a combination is no faster than the best as it stands; with more on disk it would be slower still."""
        if best is None:
            return False
        return three_digits(self.bounds.seconds(knobs)) >= _rank(best) or three_digits(
            self.seconds(knobs).seconds
        ) >= _rank(best)

    def _moves_more(self, knobs: Knobs, best: Knobs) -> bool:
        """Whether a combination only moves more than the best. Where their seconds come from other micro-batches it does
        not count: these differ in the third digit."""
        moving = {knobs.gradients == "device", best.gradients == "device"}
        return (len(moving) == 1 or len(self.workload.batches) == 1) and _moves_more(knobs, best)

    def within(self, budget: Budget) -> Found:
        """The fastest combination that fits; of equally fast ones the first, which moves the least."""
        if budget not in self._found:
            self._found[budget] = self._within(budget)
        return self._found[budget]

    def _within(self, budget: Budget) -> Found:
        best: Candidate | None = None
        for seconds, order, knobs in self.rows:
            if best is not None and seconds >= _rank(best):
                break
            if best is not None and self._moves_more(knobs, best.knobs):
                continue
            if budget.device_bytes is not None and self._least_bytes(order, knobs) > budget.device_bytes:
                continue
            found = self.fitting(knobs, budget, best)
            if found is not None and (best is None or _rank(found) < _rank(best)):
                best = found
        return Found(best, len(self.rows))

    @cached_property
    def smallest(self) -> Candidate:
        """The combination of the least device memory; of equal ones the fastest. By their bounds few are replayed."""
        found: list[Knobs] = []
        rows = ((self._least_bytes(order, row), seconds, order, row) for seconds, order, row in self.rows)
        for device_bytes, seconds, _, row in sorted(rows, key=lambda row: row[:3]):
            least_bytes = self.prediction(found[0]).device_bytes if found else device_bytes
            if device_bytes > least_bytes:
                break
            if device_bytes == least_bytes and found and seconds > min(_rank(self.candidate(knobs)) for knobs in found):
                continue  # no fewer bytes, and slower
            for knobs in self._tiles(self._least(row)):
                taken, least = self.prediction(knobs), self.prediction(found[0]) if found else None
                if least is None or taken.device_bytes < least.device_bytes:
                    found = [knobs]
                elif taken.device_bytes == least.device_bytes:
                    found.append(knobs)
        return min((self.candidate(knobs) for knobs in found), key=lambda candidate: candidate.seconds.seconds)


def _rank(candidate: Candidate) -> float:
    return three_digits(candidate.seconds.seconds)


def three_digits(seconds: float) -> float:
    """The seconds in three digits: a prediction knows no more, and plans that differ by less are equally fast."""
    return float(f"{seconds:.2e}")


def _moves_more(knobs: Knobs, best: Knobs) -> bool:
    """Whether a combination differs from the best only in moving more things: that is not faster."""
    if (knobs.prefetch != best.prefetch and best.ring + len(best.tiers)) or _has_larger_pieces(knobs, best):
        return False
    pairs = [*zip(knobs.weights, best.weights, strict=True), *zip(knobs.activations, best.activations, strict=True),
             (knobs.saved_inputs, best.saved_inputs), (knobs.states, best.states), (knobs.gradients, best.gradients),
             (knobs.head, best.head)]  # fmt: skip
    return all(here == there or there in ("device", "resident", "keep") for here, there in pairs)


def _has_larger_pieces(knobs: Knobs, best: Knobs) -> bool:
    return knobs.token_tile > best.token_tile or knobs.mlp_block > best.mlp_block
