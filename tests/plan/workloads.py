"""Workloads and searches of real layer shapes, a few layers deep, on cards and CPUs. Not a test itself."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.facts.cards import find_card
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from lopt_edge.plan.facts.presets import find_preset
from lopt_edge.plan.facts.profile import DeviceProfile, default_cpu_profile, profile_of_card
from lopt_edge.plan.search.search import Search, Space
from lopt_edge.plan.search.workload import Workload
from tests.plan.plans import make_course

SLOW_DISK, SLOW_LINK = 10, 8  # times slower than the profile says
FREE = {"optimizer": "adamw", "apply": "step"}  # what a run fixes by default


@lru_cache(maxsize=32)
def make_facts(preset: str, n_layers: int) -> ModelFacts:
    found = find_preset(preset)
    assert found is not None
    return facts_from_config(found.config | {"num_hidden_layers": n_layers}, where="here")


def make_profile(machine: str) -> DeviceProfile:
    """`cpu` or a card's name; `cpu, slow disk` or `rtx4090, slow disk`; `rtx4090, slow link` for copies, too."""
    name, _, slow = machine.partition(", slow ")
    card = find_card(name)
    profile = default_cpu_profile() if card is None else profile_of_card(card)
    if slow == "link":
        names = ("copy_up_pinned", "copy_down_pinned", "copy_up_pageable", "copy_down_pageable")
        profile = replace(profile, **{each: getattr(profile, each) / SLOW_LINK for each in names})
    if slow:
        profile = replace(profile, disk_read=profile.disk_read / SLOW_DISK, disk_write=profile.disk_write / SLOW_DISK)
    return profile


def make_workload(
    method: Any = "lopt",
    machine: str = "cpu",
    *,
    preset: str = "qwen2.5-0.5b",
    n_layers: int = 4,
    n_tokens: tuple[int, ...] = (700, 700),
    n_sequences: int = 1,
    rank: int = 8,
    **changes: Any,
) -> Workload:
    """One micro-batch for each entry of `n_tokens`."""
    facts, profile = make_facts(preset, n_layers), make_profile(machine)
    course = make_course(method, n_layers=n_layers, num_segments=min(2, n_layers))
    on_cpu = profile.device_type == "cpu"
    shape = LayerShape(facts, 4 if on_cpu else 2, rank, facts.linear_names, profile.device_type)
    batches = tuple(MicroBatchSize(n_sequences, n, n_sequences * (n - 1)) for n in n_tokens)
    library = profile.library_bytes if on_cpu else profile.context_bytes
    return Workload(course, shape, batches, profile, library, **changes)


def make_search(workload: Workload, **fixed: Any) -> Search:
    """`fixed` knobs count as said by the user."""
    return Search(workload, Space(workload.shape.facts, workload.shape.device_type, FREE | fixed, frozenset(fixed)))


@lru_cache(maxsize=64)
def search_of(method: str, machine: str, n_layers: int = 4, n_tokens: tuple[int, ...] = (700, 700)) -> Search:
    """Made once: a search remembers what it has reckoned."""
    return make_search(make_workload(method, machine, n_layers=n_layers, n_tokens=n_tokens))
