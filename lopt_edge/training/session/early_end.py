"""What ends a run before its last step: a listener that asks for it, or held-out losses that no longer fall (--patience).

The rule: a run ends between steps, with an evaluation and its adapter saved as at any end; the reason is printed and stands
in events.jsonl. What it is decided by (the lowest held-out loss and how many evaluations it stands for) is in the run's
state, so that a resumed run ends where the whole one would. The schedule of the learning rate is that of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from lopt_edge.config.settings import Config
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.session.loaded import RunContext
from lopt_edge.training.session.progress import Progress


def standing(state: RunState, losses: Mapping[str, float]) -> tuple[float | None, int]:
    """(lowest held-out loss, evaluations since) after an evaluation; the base's own loss is the first to be beaten."""
    if (loss := losses.get("eval_loss")) is None:
        return state.lowest, state.waits
    if state.lowest is None or loss < state.lowest:
        return loss, 0
    return state.lowest, state.waits + 1


def ends_early(config: Config, state: RunState, context: RunContext, *, n_steps: int) -> bool:
    """Whether the run ends after this step; then that is told and logged."""
    reason = _reason(config, state, context.progress)
    if reason:
        context.progress.note(f"the run ends after step {state.steps} of {n_steps}: {reason}")
        context.events.write({"event": "ended early", "after_step": state.steps, "reason": reason})
    return bool(reason)


def _reason(config: Config, state: RunState, progress: Progress) -> str:
    if config.patience is not None and state.waits >= config.patience:
        return f"the held-out loss was not below {state.lowest:.4f} for {state.waits} evaluations (patience)"
    return "a listener asked for it" if progress.asks_to_stop else ""
