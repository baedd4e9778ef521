"""The planner's answer: a `RunPlan` says what a run will take, with which knobs and why, and what else there would be.

It is made from a search (search.py) and a budget, by `lopt-edge plan`, by `finetune` and by `plan_run`: the same values
everywhere, all frozen, as JSON under the same keys. Bytes are predicted peaks. `items` are the bytes at the moment of the
device's peak and add up to it.

Each knob has its reason: set by the user, or found by putting it back to its fastest value and looking what that would
take. It prints nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.plan.costs.sizes import Sizes
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.knobs import TOKEN_TILES, Knobs, default_knobs, in_runs, mlp_blocks, pieces_in_words
from lopt_edge.plan.search.limits import longest_context, nearest_that_fit, smallest_card
from lopt_edge.plan.search.search import Candidate, Search, three_digits
from lopt_edge.plan.search.workload import Workload
from lopt_edge.units import format_bytes

HALF = 0.5  # of the chosen plan's device memory: an alternative is looked for below it
LEAST_SHOWN = 0.01  # of a step's seconds: what is faster or slower by less is not said to be so
REPORTED = ("weights", "activations", "saved_inputs", "states", "gradients", "head", "prefetch", "token_tile", "mlp_block",
            "mlp_tile", "optimizer", "apply")  # fmt: skip
NAMES = {"states": "optimizer_states"}  # knobs whose setting has another name


@dataclass(frozen=True)
class Alternative:
    """Another plan of the same run: `change` says what it is for, `fits` whether it is inside the budgets."""

    change: str
    fits: bool
    peak_bytes: Mapping[str, int]
    step_seconds: float
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class KindOfStep:
    """What one of a run's several kinds of step takes, and its share of the steps."""

    name: str
    share: float
    device_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class RunPlan:
    """The planner's answer: what `lopt-edge plan --json` prints. `missing` and `would_fit` are empty if it fits.

    `kinds` are the kinds of step, where the method has several: bytes are those of the largest, seconds their mean.
    `longest_context` is in tokens of one sequence, of what the memory holds (the model's own limit aside); None where no
    device budget is known. `items` has every category, most of them often 0.
    """

    fits: bool
    method: str
    peak_bytes: Mapping[str, int]
    peak_op: str
    items: Mapping[str, int]
    step_seconds: float
    tokens_per_second: float
    bytes_moved: int
    knobs: Mapping[str, Any]
    reasons: Mapping[str, str]
    alternatives: tuple[Alternative, ...]
    longest_context: int | None
    profile: str
    plan_hash: str
    budget_bytes: Mapping[str, int | None]
    missing: tuple[str, ...] = ()
    would_fit: tuple[str, ...] = ()
    smallest_card: str | None = None
    step_tokens: int = 0
    n_combinations: int = 0
    notes: tuple[str, ...] = ()
    kinds: tuple[KindOfStep, ...] = ()
    chosen: Candidate | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        device = format_bytes(self.peak_bytes["device"])
        return f"RunPlan({verdict}: {device} of device memory, {self.step_seconds:g} s a step, {self.method})"

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain JSON values."""
        found = asdict(replace(self, chosen=None))
        del found["chosen"]
        return found

    def as_json(self) -> str:
        """The answer as the text that `lopt-edge plan --json` prints."""
        return json.dumps(self.as_dict(), indent=2)


def make_run_plan(
    search: Search,
    budget: Budget,
    *,
    kinds_of_cards: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    brief: bool = False,
) -> RunPlan:
    """The answer to a search. `kinds_of_cards`: among which to look for the smallest one; `brief` leaves out what is beside
    this run (alternatives, the longest context, cards)."""
    workload, found = search.workload, search.within(budget)
    chosen = found.best or search.smallest
    step_seconds = three_digits(chosen.seconds.seconds)
    plan = workload.plan(chosen.knobs, n_micro_batches=len(workload.batches))
    misfits = () if found.best else tuple(_lowest(search, chosen, budget).prediction.misfits(budget))
    return RunPlan(
        fits=found.best is not None,
        method=workload.method,
        peak_bytes=peak_bytes(chosen.prediction, search, budget),
        peak_op=chosen.prediction.peak_op,
        items=items(workload, chosen),
        step_seconds=step_seconds,
        tokens_per_second=workload.n_tokens / step_seconds,
        bytes_moved=chosen.seconds.bytes_moved,
        knobs=shown_knobs(chosen.knobs),
        reasons=dict(_reasons(search, chosen, budget, fits=found.best is not None)),
        alternatives=() if brief else tuple(_alternatives(search, chosen, budget, fits=found.best is not None)),
        longest_context=None if brief or budget.device_bytes is None else longest_context(search, budget),
        profile=f"{workload.profile.name}: {workload.profile.source}",
        plan_hash=plan.hash(),
        budget_bytes={
            "device": budget.device_bytes,
            "host": budget.host_bytes,
            "pinned": budget.pinned_bytes,
            "disk": budget.disk_bytes,
        },
        missing=misfits,
        would_fit=() if found.best else tuple(nearest_that_fit(search, budget)),
        smallest_card=None if brief else smallest_card(search.smallest, kinds_of_cards),
        step_tokens=workload.n_tokens,
        n_combinations=found.n_combinations,
        notes=(*notes, *_beyond_pinned(chosen.prediction, budget)),
        kinds=tuple(_kinds(workload, chosen)),
        chosen=chosen,
    )


def _beyond_pinned(prediction: Prediction, budget: Budget) -> tuple[str, ...]:
    """A sentence about host memory that cannot be page-locked, if the plan has some."""
    if budget.pinned_bytes is None or prediction.host_bytes <= budget.pinned_bytes:
        return ()
    return (
        f"of {format_bytes(prediction.host_bytes)} on the host {format_bytes(budget.pinned_bytes)} may be page-locked: the "
        "rest is copied more slowly, and counted so; --pinned-memory states another limit",
    )


def _kinds(workload: Workload, chosen: Candidate) -> Iterator[KindOfStep]:
    """What each kind of step takes with the chosen settings; none where there is one kind."""
    for kind, share in zip(workload.kinds, workload.course.shares, strict=True) if len(workload.kinds) > 1 else ():
        device_bytes = workload.predict(chosen.knobs, kind=kind).device_bytes
        seconds = three_digits(workload.seconds(chosen.knobs, kind=kind).seconds)
        yield KindOfStep(kind.name, share, device_bytes, seconds)


def _lowest(search: Search, smallest: Candidate, budget: Budget) -> Candidate:
    """The smallest combination in its form with the fewest misfits, which are reported as missing."""
    forms = [smallest, *(search.candidate(knobs) for knobs in search.space.lowered(smallest.knobs))]
    return min(forms, key=lambda form: len(form.prediction.misfits(budget)))


def peak_bytes(prediction: Prediction, search: Search, budget: Budget) -> dict[str, int]:
    """The peaks by tier. Host memory of a run beside a GPU is pinned as far as its budget goes."""
    pinned = prediction.host_bytes if search.workload.shape.kind.host_is_below else 0
    if budget.pinned_bytes is not None:
        pinned = min(pinned, budget.pinned_bytes)
    return {
        "device": prediction.device_bytes,
        "host": prediction.host_bytes,
        "pinned": pinned,
        "disk": prediction.disk_bytes,
    }


def shown_knobs(knobs: Knobs) -> dict[str, Any]:
    """The knobs by the names of their settings; per-layer ones in runs of layers."""
    values = {name: getattr(knobs, name) for name in REPORTED}
    return {NAMES.get(name, name): in_runs(value) if isinstance(value, tuple) else value for name, value in values.items()}


# the bytes at the peak -------------------------------------------------------------------------------------------------


def _weights(facts: ModelFacts, sizes: Sizes, weights: int) -> dict[str, int]:
    """The bytes of all weights on the device in their parts. Blocks of GGUF have their scales in them."""
    if facts.forms is not None:
        return {f"weights ({facts.forms.text})": weights - sizes.small_bytes, "unquantised modules": sizes.small_bytes}
    return {
        "4-bit weights": sizes.code_bytes,
        "scales": weights - sizes.small_bytes - sizes.code_bytes,
        "unquantised modules": sizes.small_bytes,
    }


def items(workload: Workload, chosen: Candidate) -> dict[str, int]:
    """The bytes by category at the device's peak; they add up to it."""
    prediction = chosen.prediction
    held = dict(prediction.held_at_peak)
    weights = held.pop("weights", 0)
    sizes = workload.sizes(chosen.knobs)
    return {
        **_weights(workload.shape.facts, sizes, weights),
        "embedding": 0,  # its rows are read from the file for each batch
        "head": held.pop("head", 0),
        "adapters": held.pop("adapters", 0),
        "gradients": held.pop("gradients", 0),
        "optimizer": held.pop("optimizer", 0),
        "aux heads": held.pop("aux heads", 0),
        "saved inputs": held.pop("saved inputs", 0),
        "activations": held.pop("activations", 0),
        "dequantisation workspace": held.pop("workspace", 0),
        f"attention ({workload.shape.attention_kernel}) and tile workspace": prediction.within_peak,
        workload.shape.kind.beside: prediction.library_bytes,
        "allocator slack": prediction.slack_bytes,
        **held,
    }


# reasons and alternatives ----------------------------------------------------------------------------------------------


def _reasons(search: Search, chosen: Candidate, budget: Budget, *, fits: bool) -> Iterator[tuple[str, str]]:
    fixed, facts = search.space.fixed, search.space.facts
    fastest = default_knobs(facts, search.space.device_type)
    plain: dict[str, Any] = {
        "weights": fastest.weights, "activations": ("keep",) * facts.n_layers, "saved_inputs": "device", "states": "device",
        "gradients": "device", "head": fastest.head, "prefetch": 1, "token_tile": fastest.token_tile,
        "mlp_block": mlp_blocks(facts, search.space.device_type)[0],
    }  # fmt: skip
    for name in REPORTED:
        value = getattr(chosen.knobs, name)
        if name in fixed:
            reason = "as set" if name in search.space.said else "the default"
        elif name == "head" and not search.workload.shape.kind.host_is_below:
            reason = "no choice: read a chunk at a time from the model's file"
        elif not fits:
            reason = "takes the least device memory"
        elif value == plain.get(name, value):
            reason = "the fastest, and it fits"
        else:
            reason = _without(search, chosen, replace(chosen.knobs, **{name: plain[name]}), budget)
        yield NAMES.get(name, name), reason


def _without(search: Search, chosen: Candidate, knobs: Knobs, budget: Budget) -> str:
    """The reason why the knob is not at its fastest value: what that would need."""
    other = search.candidate(knobs)
    if misfits := other.prediction.misfits(budget):
        return f"else {misfits[0]}"
    more = other.seconds.seconds / chosen.seconds.seconds - 1
    return f"else {more:.1%} slower" if more > 0.0005 else "costs no time: it hides behind arithmetic"


def _alternatives(search: Search, chosen: Candidate, budget: Budget, *, fits: bool) -> Iterator[Alternative]:
    """The fastest plan of all if it is another one, and plans of less memory with what they cost."""
    seen = {chosen.knobs}
    fastest = search.within(Budget()).best
    if fastest is not None and fastest.knobs not in seen:
        gain = chosen.seconds.seconds / fastest.seconds.seconds - 1
        if gain >= LEAST_SHOWN:
            seen.add(fastest.knobs)
            more = format_bytes(fastest.prediction.device_bytes)
            yield _alternative(search, fastest, f"with {more} of device memory: {gain:.0%} faster", budget, fits=False)
    if not fits:
        return
    half = replace(budget, device_bytes=round(HALF * chosen.prediction.device_bytes))
    for other in (search.within(half).best, search.fitting(search.smallest.knobs, budget)):
        if other is None or other.knobs in seen:
            continue
        seen.add(other.knobs)
        saved = chosen.prediction.device_bytes - other.prediction.device_bytes
        cost = other.seconds.seconds / chosen.seconds.seconds - 1
        if saved > 0:
            slower = f"{cost:.0%} slower" if cost >= LEAST_SHOWN else "no slower"
            yield _alternative(search, other, f"{format_bytes(saved)} less device memory: {slower}", budget, fits=True)


def _alternative(search: Search, other: Candidate, change: str, budget: Budget, *, fits: bool) -> Alternative:
    return Alternative(
        change,
        fits,
        peak_bytes(other.prediction, search, budget),
        three_digits(other.seconds.seconds),
        shown_knobs(other.knobs),
    )


# words -----------------------------------------------------------------------------------------------------------------


def summary(found: RunPlan) -> Iterator[str]:
    """The answer in a few lines: what `finetune` prints, too."""
    tiers = [tier for tier, n_bytes in found.peak_bytes.items() if n_bytes]
    peaks = [f"{tier} {format_bytes(found.peak_bytes[tier])}{_of(found, tier)}" for tier in tiers]
    yield f"{'fits' if found.fits else 'DOES NOT FIT'}: {', '.join(peaks)}; the device's peak falls at {found.peak_op}"
    yield from (f"missing: {sentence}" for sentence in found.missing)
    if found.would_fit:
        yield f"one of these would fit: {'; '.join(found.would_fit)}"
    moved = f"{format_bytes(found.bytes_moved)} moved a step" if found.bytes_moved else "nothing moved between tiers"
    yield (
        f"about {_seconds(found.step_seconds)} a step of {found.step_tokens:,} tokens, {found.tokens_per_second:,.0f} "
        f"tokens/s, {moved}"
    )
    if found.kinds:
        yield f"kinds of step: {'; '.join(map(_kind_text, found.kinds))}"


def _kind_text(kind: KindOfStep) -> str:
    bytes_text, seconds = format_bytes(kind.device_bytes), _seconds(kind.step_seconds)
    return f"{kind.name} ({kind.share:.0%} of the steps) {bytes_text}, {seconds}"


def _of(found: RunPlan, tier: str) -> str:
    budget = found.budget_bytes[tier]
    return "" if budget is None else f" of {format_bytes(budget)}"


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def described(knobs: Mapping[str, Any]) -> str:
    """The memory settings on one line; `knobs` are as in a RunPlan."""
    shown = ("weights", "activations", "saved_inputs", "optimizer_states", "gradients")
    tile = f"; losses of {knobs['token_tile']} tokens at a time" if knobs["token_tile"] != TOKEN_TILES[0] else ""
    pieces = pieces_in_words(knobs["mlp_block"], knobs["mlp_tile"])
    return "; ".join(f"{name.replace('_', ' ')} {knobs[name]}" for name in shown) + tile + pieces
