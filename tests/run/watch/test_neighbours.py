"""What other programs take of a GPU while a run trains: said once, and only where the plan still needs it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lopt_edge.plan.facts.device_kinds import CUDA
from lopt_edge.run.watch.neighbours import Neighbours

GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "taken", "says"),
    [(14, 4, False), (2, 16, False), (9, 4, True), (0, 17, True)],  # of 18 that the plan needs, half a one the context's
)
def test_what_the_plan_may_still_take_is_compared_with_what_is_free(free, taken, says):
    card = SimpleNamespace(kind=CUDA, free_bytes=lambda: free * GIB, taken_bytes=lambda: taken * GIB, name=lambda: "a card")
    told: list[str] = []
    watch = Neighbours(card, need_bytes=18 * GIB, context_bytes=GIB // 2, tell=told.append)  # type: ignore[arg-type]
    for _ in range(3):
        watch.look()
    assert len(told) == says
    if told:
        assert f"{free}" in told[0] and "nvidia-smi" in told[0] and "smaller plan" in told[0]
