"""The planner's answer: that its figures add up, that it has the keys that were promised, and that its reasons are true."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, replace
from functools import lru_cache
from typing import Any

import pytest

from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.schedule.knobs import default_knobs, mlp_blocks
from lopt_edge.plan.search.run_plan import RunPlan, described, make_run_plan, summary
from lopt_edge.plan.search.search import Search
from lopt_edge.units import format_bytes
from tests.plan.workloads import make_search, make_workload

KEYS = {"fits", "method", "peak_bytes", "peak_op", "items", "step_seconds", "tokens_per_second", "bytes_moved", "knobs",
        "reasons", "alternatives", "longest_context", "profile", "plan_hash"}  # fmt: skip
TIERS = ("device", "host", "pinned", "disk")
MACHINES = ("cpu", "rtx 4060 laptop")


@lru_cache(maxsize=16)
def search_of(machine: str, *, method: str = "lopt", evaluates: bool = False) -> Search:
    evaluation = MicroBatchSize(4, 3000, 11000) if evaluates else None
    return make_search(make_workload(method, machine, n_layers=4, n_tokens=(900, 900), evaluation=evaluation))


def share(search: Search, part: float) -> Budget:
    """A device budget between the smallest peak (0) and the fastest plan's (1)."""
    least, most = search.smallest.prediction.device_bytes, search.within(Budget()).best.prediction.device_bytes
    return Budget(device_bytes=round(least + part * (most - least)))


def answer(machine: str, part: float, *, brief: bool = False, **how: Any) -> tuple[Search, RunPlan]:
    """`brief`: of what is asked for this run alone; the rest is several searches more."""
    search = search_of(machine, **how)
    return search, make_run_plan(search, share(search, part), kinds_of_cards=("desktop",), brief=brief)


@pytest.mark.parametrize(
    ("machine", "method", "part", "evaluates"),
    [
        ("cpu", "lopt", -0.5, False), ("cpu", "e2e", 0.4, True), ("cpu", "frozen", 0.4, False),
        ("rtx 4060 laptop", "lopt", 0.4, True), ("rtx 4060 laptop", "e2e", -0.5, False),
        ("rtx 4060 laptop", "frozen", -0.5, True),
    ],
)  # fmt: skip
def test_items_add_up_to_the_peak(machine, method, part, evaluates):
    """Every pair of a machine, a method, a budget (too small or not) and an evaluation: an item comes from one of them (the
    card's context, the aux heads, what is moved, the evaluation's tensors), and is added to the others'."""
    _, found = answer(machine, part, method=method, evaluates=evaluates, brief=True)
    assert sum(found.items.values()) == found.peak_bytes["device"]
    assert min(found.items.values()) >= 0
    assert found.items["4-bit weights"] > 8 * found.items["scales"] > 0
    assert (found.peak_op == "evaluation") == evaluates, "the large evaluation sets the peak"


def test_json_has_the_promised_keys():
    _, found = answer("rtx 4060 laptop", 0.5)
    values = json.loads(found.as_json())
    assert set(values) >= KEYS
    assert tuple(values["peak_bytes"]) == TIERS and tuple(values["budget_bytes"]) == TIERS
    assert set(values["knobs"]) == set(values["reasons"])
    assert set(values["alternatives"][0]) == {"change", "fits", "peak_bytes", "step_seconds", "knobs"}
    assert values == json.loads(json.dumps(found.as_dict()))
    assert "chosen" not in values
    assert values["profile"].startswith("RTX 4060 Laptop: ")
    assert values["tokens_per_second"] == pytest.approx(1800 / values["step_seconds"])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("part", [0.1, 0.6, 1.0])
def test_the_hash_is_that_of_the_plan_that_will_run(machine, part):
    search, found = answer(machine, part, brief=True)
    plan = search.workload.plan(found.chosen.knobs, n_micro_batches=2)
    assert found.plan_hash == plan.hash()
    assert found.bytes_moved == search.workload.seconds(found.chosen.knobs).bytes_moved
    assert found.fits and found.peak_bytes["device"] <= found.budget_bytes["device"]


def test_answers_are_frozen():
    _, found = answer("cpu", 0.5)
    for name in ("fits", "peak_op", "knobs"):
        with pytest.raises(FrozenInstanceError):
            setattr(found, name, None)
    with pytest.raises(FrozenInstanceError):
        found.alternatives[0].fits = False


# reasons ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("method", ["lopt", "e2e"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7])
def test_reasons_are_true(machine, method, part):
    """Put a knob back to its fastest value: then it does not fit, or is slower, or takes as long, as the reason says."""
    search, found = answer(machine, part, method=method, brief=True)
    fastest = default_knobs(search.space.facts, search.space.device_type)
    plain = {"weights": fastest.weights, "activations": ("keep",) * 4, "saved_inputs": "device", "states": "device",
             "gradients": "device", "head": fastest.head, "prefetch": 1, "token_tile": 1024,
             "mlp_block": mlp_blocks(search.space.facts, search.space.device_type)[0]}  # fmt: skip
    said = set()
    for name, value in plain.items():
        reason, chosen = found.reasons["optimizer_states" if name == "states" else name], found.chosen
        if name == "head" and machine == "cpu":
            assert reason.startswith("no choice: read a chunk at a time"), "it is on no tier that a plan moves things from"
            continue
        if getattr(chosen.knobs, name) == value:
            assert reason == "the fastest, and it fits"
            continue
        other = search.candidate(replace(chosen.knobs, **{name: value}))
        budget = share(search, part)
        if reason.startswith("else device memory: "):
            assert not other.prediction.fits(budget)
            assert f"{format_bytes(other.prediction.device_bytes)} needed" in reason
        else:
            assert other.prediction.fits(budget), reason
            slower = other.seconds.seconds > 1.0005 * chosen.seconds.seconds
            assert slower == reason.endswith("slower"), reason
        said.add(name)
    assert said, "something had to move"
    assert found.reasons["optimizer"] == found.reasons["apply"] == "the default"


def test_what_the_user_set_is_given_as_such():
    search = make_search(make_workload(n_tokens=(300,)), weights=("disk",) * 4, states="disk")
    found = make_run_plan(search, Budget())
    assert (found.reasons["weights"], found.reasons["optimizer_states"]) == ("as set", "as set")
    assert found.reasons["activations"] == "the fastest, and it fits"
    assert found.longest_context is None, "no device budget is known"


def test_a_smaller_tile_has_its_reason_and_is_said():
    workload = make_workload("lopt", "rtx 4060 laptop", preset="llama-3.1-8b", n_layers=4, n_tokens=(512,))
    search = make_search(workload, head="disk")
    found = make_run_plan(search, Budget(device_bytes=search.smallest.prediction.device_bytes))
    assert found.fits and found.knobs["token_tile"] == found.chosen.knobs.token_tile < 1024
    assert found.reasons["token_tile"].startswith("else device memory: ")
    tile = found.knobs["token_tile"]
    assert f"losses of {tile} tokens at a time" in described(found.knobs)
    assert str(tile) in found.chosen.knobs.described()
    assert workload.plan(found.chosen.knobs, n_micro_batches=1).tile == tile
    plain = make_run_plan(search, Budget())
    assert plain.knobs["token_tile"] == 1024 and "losses of" not in described(plain.knobs)
    blocks = found.knobs["mlp_block"], plain.knobs["mlp_block"]
    assert blocks == (1024, 14336), "all features where there is room"
    assert found.reasons["mlp_block"].startswith("else device memory: ")
    assert "MLPs in blocks of 14336 x 4096 tokens" in described(plain.knobs)
    assert " mlp=14336x4096 " in f"{workload.plan(plain.chosen.knobs, n_micro_batches=1).text()} ".replace("\n", " ")


# what else there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_alternatives_cost_what_they_say(machine):
    search, found = answer(machine, 0.6)
    assert found.alternatives
    for other in found.alternatives:
        if other.fits:
            assert other.peak_bytes["device"] < found.peak_bytes["device"] and "less device memory" in other.change
            assert other.peak_bytes["device"] <= found.budget_bytes["device"]
        else:
            assert other.peak_bytes["device"] > found.budget_bytes["device"] and "faster" in other.change
            assert other.step_seconds < found.step_seconds
    brief = make_run_plan(search, share(search, 0.6), brief=True)
    assert (brief.alternatives, brief.longest_context, brief.smallest_card) == ((), None, None)
    assert (brief.knobs, brief.plan_hash, brief.items) == (found.knobs, found.plan_hash, found.items)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("part", [0.3, 0.6, 1.0])
def test_no_words_of_differences_that_are_none(machine, part):
    """A budget beyond the fastest plan's, too: nothing is then moved between tiers, and what is no slower is said so."""
    _, found = answer(machine, part)
    text = " ".join([*summary(found), *(other.change for other in found.alternatives)])
    assert not re.search(r"(?<![\d.])-?0% (slower|faster)|-\d+%|(?<!\d)0 bytes", text), text
    assert ("nothing moved between tiers" in text) == (found.bytes_moved == 0)


def test_pinned_bytes_are_the_hosts_within_their_budget():
    search = search_of("rtx 4060 laptop")
    budget = share(search, 0.0)
    free = make_run_plan(search, budget, brief=True).peak_bytes
    assert 0 < free["pinned"] == free["host"]
    beyond = make_run_plan(search, replace(budget, pinned_bytes=1000), brief=True)
    assert beyond.peak_bytes["pinned"] == 1000 and "the rest is copied more slowly" in beyond.notes[-1]
    assert make_run_plan(search_of("cpu"), share(search_of("cpu"), 0.0), brief=True).peak_bytes["pinned"] == 0


def test_a_run_that_does_not_fit_says_what_is_missing():
    search, found = answer("cpu", -0.5)
    assert not found.fits
    need = search.smallest.prediction.device_bytes
    assert found.missing == (
        f"device memory: {format_bytes(need)} needed, {format_bytes(found.budget_bytes['device'])} allowed",
    )
    assert found.peak_bytes["device"] == need
    assert found.would_fit
    lines = list(summary(found))
    assert lines[0].startswith("DOES NOT FIT: device ")
    assert any(line.startswith("one of these would fit: ") for line in lines)
    assert next(summary(answer("cpu", 0.5)[1])).startswith("fits: device ")
