"""What an attempt that came to its end hands to the final report (training/finish.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.run.watch.first_steps import FirstSteps
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.tiers import PeakBytes


@dataclass(frozen=True, eq=False)
class Finished:
    """The facts about an attempt that came to its end which the final report needs."""

    inputs: Inputs
    state: RunState
    seconds: Mapping[str, float]
    predicted: Mapping[str, Any]
    folder: Path
    cache_bytes: int
    first_steps: FirstSteps
    peaks_below: PeakBytes
