"""What training will take, from the steps that were watched: the planner's prediction with its error taken out.

What was measured holds the process' libraries, the allocator's gaps and the kernels' own memory, which a prediction can
only bound. So what the largest step takes is what was measured, and on top of that only what the watched step nearest to it
is predicted to take less: nothing if it was as large, the optimizer states if it was the very first step of a run. A
resumed run watches the two steps that it begins with, which may be small ones.

A margin (`later_part` of the device's kind) is for what comes later. On a CPU the heap goes on to fragment: over 6 steps of
equal lengths (0.5B shape, 8 runs of `tools/validate_planner.py process --steps 6`, rows in tools/results) the peak rose
after the second step by 0.0 to 1.0%, and in one run (graphs paged, 512 tokens) by 3.1%; so 4%, chosen after these runs.
CUDA's allocator keeps whole blocks: 1%, not measured yet. Saving is not meant: it comes when a step's tensors are gone.
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
    """The device's peak until the last step in bytes, where the largest step is predicted to take `largest_bytes`."""
    measured = max(step.measured_bytes for step in watched)
    more = min(max(0, largest_bytes - step.predicted_bytes) + step.missing_bytes for step in watched)
    return measured + more + -(-(measured + more) // kind_of(device_type).later_part)
