"""Budgets beyond what there is: lowered to it, and said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import CUDA
from lopt_edge.planning.budgets import GRANTED_SHARE, with_pinned_limit, within_free, within_granted

GIB = 1 << 30


@pytest.fixture(autouse=True)
def group_of_2_gib(monkeypatch):
    monkeypatch.setattr("lopt_edge.planning.budgets.granted_bytes", lambda: (2 * GIB, "the control group"))


def test_a_device_budget_beyond_the_group_is_lowered_and_said_on_a_cpu():
    lowered, (sentence,) = within_granted(Budget(device_bytes=3 * GIB, disk_bytes=5), "cpu")
    assert lowered == Budget(device_bytes=round(GRANTED_SHARE * 2 * GIB), disk_bytes=5)
    assert "device memory lowered from the 3.0 GiB" in sentence and "the control group grants" in sentence


def test_beside_a_gpu_it_is_the_host_budget():
    lowered, (sentence,) = within_granted(Budget(device_bytes=24 * GIB, host_bytes=32 * GIB), "cuda")
    assert lowered == Budget(device_bytes=24 * GIB, host_bytes=round(GRANTED_SHARE * 2 * GIB))
    assert sentence.startswith("host memory lowered")


@pytest.mark.parametrize(("stated", "left"), [(24, 10.5), (10, 10), (None, None)])
def test_a_gpu_that_others_use_gives_what_they_leave(monkeypatch, stated, left):
    card = SimpleNamespace(kind=CUDA, free_bytes=lambda: 10 * GIB, taken_bytes=lambda: 0, name=lambda: "a card")
    monkeypatch.setattr("lopt_edge.run.device.device_of", lambda device: card)
    asked = Budget(device_bytes=stated and stated * GIB)
    found, said = within_free(asked, torch.device("cuda"))
    assert found.device_bytes == (None if left is None else round(left * GIB))
    assert bool(said) == (stated == 24)
    assert all("other programs leave of a card" in sentence for sentence in said)


def test_the_pinned_limit_of_the_machine_is_a_budget(monkeypatch):
    monkeypatch.setattr("lopt_edge.planning.budgets.pinned_limit_bytes", lambda: (GIB, "WSL"))
    assert with_pinned_limit(Budget(), "cuda").pinned_bytes == GIB
    assert with_pinned_limit(Budget(pinned_bytes=5), "cuda").pinned_bytes == 5
    assert with_pinned_limit(Budget(), "cpu").pinned_bytes is None


@pytest.mark.parametrize(
    ("stated", "device"), [(Budget(device_bytes=GIB), "cpu"), (Budget(), "cpu"), (Budget(device_bytes=24 * GIB), "cuda")]
)
def test_what_there_is_is_left_as_it_was_stated(stated, device):
    assert within_granted(stated, device) == (stated, ())
