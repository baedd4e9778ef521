"""Where a run stands: all that is not a tensor, as plain values that survive JSON to the last bit.

Together with the tensors of a checkpoint (snapshot.py) it is the whole state: a run that goes on from it is the run that
was not interrupted (design law 7). The place in the data is two integers, since the order of an epoch is a function of
seed, epoch and number of examples (data/order.py). What does not decide the future (seconds, peaks) is carried for the
report only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from lopt_edge.errors import InputError

LEVEL_SHARE = 0.05  # of a new loss in its running level: about the last 20 steps
LEVEL_STEPS = 20  # before a rise is called one
FAR_DEVIATIONS, FAR_SHARE = 6.0, 0.5  # a loss is far above its level if it is beyond both

LATER = (
    "intact",
    "unexplained",
    "lowest",
    "waits",
    "first_losses",
    "last_losses",
)  # fields that checkpoints of earlier versions lack


@dataclass
class LossLevel:
    """Running mean and variance of the task loss."""

    n_steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, loss: float) -> bool:
        """Take the next loss into the level; returns whether it lies far above the level before it."""
        rise = loss - self.mean
        far = self.n_steps >= LEVEL_STEPS and rise > max(FAR_DEVIATIONS * self.variance**0.5, FAR_SHARE * abs(self.mean))
        share = max(LEVEL_SHARE, 1 / (self.n_steps + 1))
        self.mean += share * rise
        self.variance = (1 - share) * (self.variance + share * rise * rise)
        self.n_steps += 1
        return far


@dataclass
class RunState:
    """The place, counts and measurements of a run after a finished step, or inside the next one.

    `steps` are finished (skipped ones included); `sequences` of the next window are in the gradients and in `losses` (by
    segment). `evaluated` is the last step whose evaluation is logged, -1 for none.
    """

    steps: int = 0
    sequences: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0
    final_loss: float | None = None
    loss_scale: float = 1.0
    evaluated: int = -1
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] | None = None  # with keep_best: the evaluation of the saved adapter
    samples: dict[str, str] = field(default_factory=dict)
    level: LossLevel = field(default_factory=LossLevel)
    stage_ends: list[int] = field(default_factory=list)  # last steps of the stages that ended early
    stage: int = 0  # of which the next two are: its lowest held-out loss, and for how many evaluations that stands
    stage_loss: float | None = None
    stage_waits: int = 0
    lowest: float | None = None  # with patience: held-out loss so far, and evaluations since it was reached
    waits: int = 0
    first_losses: list[float] = field(default_factory=list)  # where a boundary closes itself: of the first stretch of steps
    last_losses: list[float] = field(default_factory=list)  # of the last two stretches
    skip: list[int] = field(default_factory=list)  # steps known to end in numbers that are not finite
    intact: dict[str, float] = field(default_factory=dict)  # method repl: evaluation before layers were replaced
    unexplained: dict[str, dict[str, float]] = field(default_factory=dict)  # by layer and linear layer: shares of a norm
    skipped: int = 0
    skipped_in_row: int = 0
    log_bytes: int = 0
    unlogged: dict[str, Any] | None = None  # the last finished step's line, which the disk did not take
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, *, where: str) -> RunState:
        """The state that `as_dict` gave. Raises InputError, naming `where`, for values that no run wrote."""
        try:
            known = {item.name: values[item.name] for item in fields(cls) if item.name in values or item.name not in LATER}
            _types().validate_json(json.dumps(known, allow_nan=False), strict=True)  # types only: floats stay exact
            state = cls(**{**known, "level": LossLevel(**known["level"])})
            counts = (state.steps, state.sequences, state.log_bytes, state.tokens, state.supervised_tokens, state.skipped,
                      state.skipped_in_row, state.stage, state.stage_waits, state.waits, state.peak_rss_bytes,
                      state.peak_device_bytes, state.level.n_steps, state.evaluated + 1, *state.skip,
                      *state.stage_ends)  # fmt: skip
            seconds = (*state.seconds.values(), state.level.variance)
            sound = min(counts) >= 0 and min(seconds) >= 0 and state.loss_scale > 0
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
            sound = False
        if not sound:
            raise InputError("the run's state is malformed", where=where, fix="use another checkpoint")
        return state


@cache
def _types() -> TypeAdapter[RunState]:
    return TypeAdapter(RunState)
