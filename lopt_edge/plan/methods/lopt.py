"""LoPT (arXiv 2605.04913): a gradient boundary; early segments learn a local loss, only the last one the task.

With blocks 1 .. k, x_j the detached input of block j, y_j = block_j(x_j), x_(j+1) = stop(y_j):

    L = task(y_k) + lambda * mean over j < k of local_j;     local_j = mean over tokens and elements of (aux_j(y_j) - x_j)^2

The released code runs both halves and one joint backward, which saves no activation memory; the paper describes the
sequential form, which is what the op list does: a block's forward, loss and backward before the next block begins. The
gradients are exactly the joint form's ("stale": all updates at the step's end).

Options, none of them the paper's own:
- `boundary_update fresh`: an early block is updated first, and the next one sees the updated block's output (a forward
  more for each early block).
- `local_every N`: early blocks train on every N-th step and only run forward, saving nothing, on the others; 0: never, so
  their adapters stay as they are (fresh ones are zero, which makes it `frozen`).
- `local_loss`: `reconstruct`, the paper's; `next-token` reads out through the frozen norm and lm_head (the paper reports
  it as harmful) with next-token_j = mean over supervised tokens of the cross-entropy at y_j; `align` is the negative
  cosine to a teacher's last hidden state (methods/let.py says which), with a constant weight.
- `open_every N`: on every N-th step the boundary opens: an end-to-end step, in which the early layers get the task's
  gradient, at the task's learning rate; AdamW's moments are one set for both. At 1/N of its cost.
- `lr_local`: lr / 100 where nothing is said, and not lr as in the paper: with LoRA the reconstruction at the task's rate
  did harm on both tasks of our study (README).
Where we deviate from the released code otherwise (padding, embeddings, dtypes, clipping): shared/design.md.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING

from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment, cut_depth

if TYPE_CHECKING:
    from lopt_edge.config.settings import Config

LOCAL, REST, OPEN = "local", "rest", "open"  # kinds of step


def course(config: Config, n_layers: int) -> Course:
    early = config.local_loss if config.local_every else "rest" if config.open_every else "none"
    segments = cut_depth(early, n_layers=n_layers, num_segments=config.num_segments, boundary_layers=config.boundary_layers)
    teacher = config.local_loss == "align" and any(segment.is_local for segment in segments)
    fresh = config.boundary_update == "fresh" and len(segments) > 1 and bool(config.local_every)
    kinds = {
        OPEN: StepKind(OPEN, (Segment(0, 0, n_layers - 1, "task"),)),
        LOCAL: StepKind(LOCAL, segments, fresh=fresh, teacher=teacher),
        REST: StepKind(REST, tuple(replace(s, loss="rest") if s.is_local else s for s in segments)),
    }
    cycle = _cycle(config.local_every, config.open_every)
    if set(cycle) == {LOCAL}:
        return Course("lopt", (replace(kinds[LOCAL], name=""),))
    return Course("lopt", tuple(kinds[name] for name in dict.fromkeys(cycle)), (Phase(1.0, cycle),))


def _cycle(local_every: int, open_every: int) -> tuple[str, ...]:
    """Kinds by step, the largest one first, so that it is seen at once: the open one, else the local one.

    Beside open steps the local one comes last in its turn; where both fall together the open one wins.
    """
    length, turn = lcm(max(1, local_every), max(1, open_every)), local_every - 1 if open_every else 0

    def name(step: int) -> str:
        if open_every and step % open_every == 0:
            return OPEN
        if open_every and not local_every:
            return REST
        return LOCAL if local_every <= 1 or step % local_every == turn else REST

    return tuple(name(step) for step in range(length))
