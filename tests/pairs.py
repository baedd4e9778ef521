"""Products of parameters: the pairs run by default, the rest with `-m long`.

What goes wrong in a combination of settings goes wrong in two of them together, nearly always. So of a product each pair of
values of two axes is in a test that runs by default, and whatever else the product holds is there for `-m long`. The choice
is greedy and the same each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairs(*axes: Iterable[Any]) -> list[Any]:
    """The product of the axes, for pytest.mark.parametrize; what a cover of all pairs can spare is marked `long`."""
    values = [list(axis) for axis in axes]
    every = list(product(*(range(len(axis)) for axis in values)))
    left, chosen = {pair for one in every for pair in _pairs(one)}, set()
    while left:
        best = max(every, key=lambda one: sum(pair in left for pair in _pairs(one)))
        chosen.add(best)
        left.difference_update(_pairs(best))
    marks = {True: (), False: (pytest.mark.long,)}
    return [
        pytest.param(*(axis[at] for axis, at in zip(values, one, strict=True)), marks=marks[one in chosen]) for one in every
    ]


def _pairs(one: Sequence[int]) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    return combinations(enumerate(one), 2)
