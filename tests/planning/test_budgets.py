"""Budgets beyond what there is: lowered to it, and said."""

from __future__ import annotations

import pytest

from lopt_edge.plan.facts.budget import Budget
from lopt_edge.planning.budgets import GRANTED_SHARE, within_granted

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


@pytest.mark.parametrize(
    ("stated", "device"), [(Budget(device_bytes=GIB), "cpu"), (Budget(), "cpu"), (Budget(device_bytes=24 * GIB), "cuda")]
)
def test_what_there_is_is_left_as_it_was_stated(stated, device):
    assert within_granted(stated, device) == (stated, ())
