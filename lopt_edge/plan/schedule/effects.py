"""What each kind of op does: what it computes with, what it enters, what it moves and between which tiers.

The rule: whoever interprets a plan (validator, timeline, clock, cuts, executor) reads this table; none has its own idea of
an op. It holds no bytes and no seconds: those are plan/costs.
"""

from __future__ import annotations

from lopt_edge.plan.schedule.ops import Kind

COMPUTE = (Kind.EMBED, Kind.FORWARD, Kind.LOSS, Kind.BACKWARD, Kind.STEP, Kind.READ, Kind.WRITE, Kind.ALIGN, Kind.HOLD,
           Kind.RECV, Kind.SEND, Kind.AGREE)  # fmt: skip
ENTERS = (Kind.EMBED, Kind.READ, Kind.RECV)  # a micro-batch
LAYER_COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
_UP = (Kind.FETCH, Kind.RESTORE, Kind.PAGE_IN, Kind.LOAD)
_DOWN = (Kind.SPILL, Kind.PAGE_OUT, Kind.STORE)
_ITEMS = {Kind.SPILL: "input", Kind.RESTORE: "input", Kind.PAGE_OUT: "pages", Kind.PAGE_IN: "pages"}
_NEEDS_TIER = (Kind.SPILL, Kind.PAGE_OUT, Kind.STORE)
