"""What training will take, seen from the steps that were watched: the planner's prediction, or more where it was too low.

What was measured holds the process' libraries, the allocator's gaps and the kernels' own memory, which a prediction can
only bound. So what the largest step takes is what was measured of a watched one, and on top of that only what that one is
predicted to take less: nothing if it was as large, the optimizer states if it was the very first step of a run. Of the
watched steps the one that leads to the least is believed, but never less than was measured. A resumed run watches the two
steps that it begins with, which may be small ones.

The rule: it corrects upwards only. What two steps did not take may still come: sequences of other lengths leave other
holes on a CPU's heap, up to where it is trimmed, the prediction (system/allocator.py). When it corrected downwards it was
too low in 10 of 10 runs of varying lengths, by 4 to 11%. Where the prediction was too low the heap is trimmed at each
stride, and a margin (`later_part` of the device's kind) is for that; CUDA's, whose allocator keeps whole blocks, is not
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lopt_edge.plan.facts.device_kinds import kind_of


@dataclass(frozen=True)
class Watched:
    """A step that was watched: device bytes as predicted, the process' peak after it, and what it did not have yet."""

    predicted_bytes: int
    measured_bytes: int
    missing_bytes: int = 0


def corrected_bytes(watched: Sequence[Watched], largest_bytes: int, *, device_type: str) -> int:
    """The device's peak in bytes, where the largest step is predicted to take `largest_bytes`: never less than that."""
    measured = max(step.measured_bytes for step in watched)
    with_rest = (
        step.measured_bytes + max(0, largest_bytes - step.predicted_bytes) + step.missing_bytes for step in watched
    )
    found = max(measured, min(with_rest))
    return largest_bytes if found <= largest_bytes else found + -(-found // kind_of(device_type).later_part)
