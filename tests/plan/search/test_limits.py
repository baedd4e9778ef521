"""How far a budget reaches: what is said to fit is put back into the search and must fit, and a little more must not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.cards import CARDS
from lopt_edge.plan.search.limits import frugal, longest_context, nearest_that_fit, smallest_card
from lopt_edge.plan.search.search import Search
from lopt_edge.units import parse_bytes
from tests.plan.plans import make_course
from tests.plan.workloads import make_search, make_workload

MIB = 1 << 20
ROUND = 1.05  # a context that is longer by this does not fit: three times what the search for it leaves open


def fits(search: Search, budget: Budget, n_tokens: int) -> bool:
    return Search(search.workload.with_tokens(n_tokens), search.space).within(budget).best is not None


@pytest.mark.parametrize(
    ("method", "machine", "preset", "budget", "fixed"),
    [
        ("lopt", "rtx 4060 laptop", "llama-3.1-8b", Budget(2500 * MIB), {}),
        ("e2e", "rtx 4060 laptop", "qwen3-8b", Budget(4000 * MIB), {}),
        ("lopt", "rtx 4060 laptop", "llama-3.1-8b", Budget(4000 * MIB, 700 * MIB), {}),
        ("lopt", "rtx 4060 laptop", "llama-3.1-8b", Budget(4000 * MIB, 300 * MIB, 200 * MIB), {}),
        ("e2e", "rtx4090", "llama-3.2-1b", Budget(3000 * MIB, 1, 1), {}),
        ("frozen", "rtx 3060", "gemma-2-2b", Budget(3000 * MIB, 500 * MIB), {}),
        ("lopt", "rtx4090", "llama-3.2-1b", Budget(8000 * MIB), {"activations": ("keep",) * 4, "prefetch": 1}),
        ("lopt", "cpu", "qwen2.5-0.5b", Budget(800 * MIB), {}),
        ("lopt", "cpu", "qwen2.5-0.5b", Budget(800 * MIB, None, 20 * MIB), {}),
        ("e2e", "cpu", "llama-3.2-3b", Budget(1500 * MIB), {"weights": ("disk",) * 4}),
    ],
)
def test_the_longest_context_fits_and_one_five_percent_longer_does_not(method, machine, preset, budget, fixed):
    search = make_search(make_workload(method, machine, preset=preset), **fixed)
    longest = longest_context(search, budget)
    assert longest > 100
    assert fits(search, budget, longest)
    assert not fits(search, budget, round(ROUND * longest))


def test_no_context_fits_where_not_even_the_shortest_does():
    search = make_search(make_workload("lopt", "cpu"))
    assert longest_context(search, Budget(300 * MIB)) == 0
    assert not fits(search, Budget(300 * MIB), 16)


def test_more_memory_never_shortens_the_longest_context():
    search = make_search(make_workload("lopt", "rtx 4060 laptop"))
    found = [longest_context(search, Budget(n * MIB)) for n in (900, 1200, 2000, 4000)]
    assert found == sorted(found) and len(set(found)) == 4


def test_it_is_the_context_of_the_run_with_all_its_micro_batches_and_evaluation():
    budget = Budget(700 * MIB)
    alone, many, evaluates = (
        longest_context(make_search(make_workload(n_tokens=n, evaluation=evaluation)), budget)
        for n, evaluation in (((700,), None), ((700,) * 64, None), ((700,), MicroBatchSize(16, 700, 11000)))
    )
    assert many < alone and evaluates < alone


def test_the_combinations_of_little_memory_have_the_smallest_tile():
    search = make_search(make_workload("lopt", "rtx 4060 laptop"))
    for limited in (False, True):
        smallest, *low = frugal(search, limited=limited)
        assert smallest == search.smallest.knobs
        assert {knobs.token_tile for knobs in low if knobs not in search.space.lowered(smallest)} == {256}
    fixed = frugal(make_search(search.workload, token_tile=512), limited=True)
    assert {knobs.token_tile for knobs in fixed} == {512}


# what would fit --------------------------------------------------------------------------------------------------------


def applied(search: Search, budget: Budget, flags: str) -> tuple[Search, Budget]:
    """The run with the flags of one suggestion."""
    workload, fixed = search.workload, dict(search.space.fixed)
    words = re.sub(r" \([^)]*\)", "", flags).split()
    values = dict(zip(words[::2], words[1::2], strict=True))
    for flag, text in values.items():
        if flag == "--max-seq-len":
            workload = workload.with_tokens(int(text))
        elif flag == "--batch-size":
            first = workload.batches[0]
            n_all = sum(batch.n_sequences for batch in workload.batches)
            assert (text, values["--grad-accum"]) == ("1", str(n_all)), "as many sequences a step as before"
            workload = replace(workload, batches=(MicroBatchSize(1, first.n_tokens, first.n_tokens - 1),) * n_all)
        elif flag == "--method":
            workload = replace(workload, course=make_course(text, n_layers=workload.shape.facts.n_layers, num_segments=2))
        elif flag == "--lora-r":
            workload = replace(workload, shape=replace(workload.shape, rank=int(text)))
        elif flag == "--optimizer":
            fixed["optimizer"] = text
        elif flag.endswith("-memory"):
            tier = flag.strip("-").partition("-")[0]
            n_bytes = parse_bytes(text, free_bytes=None, where=flag)
            budget = replace(budget, **{f"{tier}_bytes": n_bytes})
    return make_search(workload, **fixed), budget


def run(**changes: Any) -> Search:
    values = {"method": "e2e", "machine": "cpu", "n_tokens": (900,) * 2, "n_sequences": 2, "rank": 64, **changes}
    fixed = values.pop("fixed", {})
    return make_search(make_workload(values.pop("method"), values.pop("machine"), **values), **fixed)


ON_HOST = {"machine": "rtx 4060 laptop", "fixed": {"weights": ("host",) * 4}}


@pytest.mark.parametrize(
    ("changes", "budget", "expected"),
    [
        ({}, Budget(570 * MIB), {"--max-seq-len", "--batch-size", "--device-memory"}),
        ({"fixed": {"states": "device", "gradients": "device"}}, Budget(615 * MIB),
         {"--max-seq-len", "--lora-r", "--optimizer"}),
        ({"fixed": {"activations": ("keep",) * 4}}, Budget(680 * MIB), {"--method", "--batch-size"}),
        ({"machine": "rtx 4060 laptop"}, Budget(500 * MIB), {"--device-memory"}),
        (ON_HOST, Budget(2000 * MIB, 10 * MIB), {"--host-memory"}),
        (ON_HOST, Budget(100 * MIB, 1 * MIB), {"--device-memory"}),
        ({"fixed": {"states": "disk"}}, Budget(None, None, 1 * MIB), {"--disk-memory"}),
    ],
)  # fmt: skip
def test_each_suggestion_alone_makes_it_fit(changes, budget, expected):
    search = run(**changes)
    assert search.within(budget).best is None
    suggestions = list(nearest_that_fit(search, budget))
    assert {text.split()[0] for text in suggestions} >= expected, suggestions
    for text in suggestions:
        changed, allowed = applied(search, budget, text)
        assert changed.within(allowed).best is not None, text


def test_two_tiers_that_are_short_are_told_in_one_suggestion():
    search = run(machine="rtx 4060 laptop", fixed={"weights": ("host",) * 4})
    (text,) = [text for text in nearest_that_fit(search, Budget(100 * MIB, 1 * MIB)) if "-memory" in text]
    assert "--device-memory" in text and "--host-memory" in text


def test_the_smallest_card_holds_it_and_no_smaller_one_does():
    search = make_search(
        make_workload("lopt", "rtx4090", preset="llama-3.1-8b", n_layers=4, n_tokens=(40000,)),
        weights=("resident",) * 4,
        activations=("keep",) * 4,
    )
    need = search.smallest.prediction.device_bytes
    kinds = ("desktop", "laptop")
    name = smallest_card(search.smallest, kinds)
    assert CARDS[name].memory_bytes >= need
    smaller = [card for card in CARDS.values() if card.kind in kinds and card.memory_bytes < CARDS[name].memory_bytes]
    assert smaller and all(card.memory_bytes < need for card in smaller)
    assert CARDS[smallest_card(search.smallest, ("data-centre",))].kind == "data-centre"
    assert smallest_card(search.smallest, ()) is None
    huge = make_search(
        make_workload("lopt", "rtx4090", preset="llama-3.1-8b", n_tokens=(1 << 22,)),
        saved_inputs="device",
        activations=("recompute",) * 4,
    )
    assert smallest_card(huge.smallest, kinds) is None
