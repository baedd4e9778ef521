"""What replacing layers cost and what training won back (method `repl`), for run.json, the terminal and the model card.

    jump = loss after replacing - loss of the intact model;   closed = (loss after replacing - loss at the end) / jump

The intact model was not trained, so `closed` counts what the task taught as well: beyond 100% the run ends below the intact
model's loss. What the layers would have been worth is shown by `--method e2e` on the same data, not here. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lopt_edge.training.checkpoint.run_state import RunState

NAMES = {"eval_loss": "held-out loss", "retention_loss": "retention loss"}


def replacement(state: RunState, layers: tuple[int, ...]) -> dict[str, Any]:
    """The facts of run.json about replaced layers: empty where nothing was replaced; `closed` only where the loss rose."""
    if not layers:
        return {}
    after = state.after or state.before
    jump = {name: state.before[name] - loss for name, loss in state.intact.items() if name in state.before}
    closed = {name: (state.before[name] - after[name]) / rise for name, rise in jump.items() if rise > 0 and name in after}
    return {
        "layers": list(layers),
        "unexplained": state.unexplained,
        "intact": state.intact,
        "jump": jump,
        "closed": closed,
    }


def sentences(found: Mapping[str, Any], after: Mapping[str, float]) -> Iterator[str]:
    """A sentence for each loss: the intact model's, after replacing, after training."""
    for name, jump in found.get("jump", {}).items():
        intact = found["intact"][name]
        text = f"{NAMES[name]}: intact model {intact:.4f}, layers replaced {intact + jump:.4f} ({jump:+.4f})"
        text += f", after training {after[name]:.4f}" if name in after else ""
        yield f"{text}{_verdict(found['closed'].get(name))}"


def _verdict(closed: float | None) -> str:
    if closed is None:
        return ""
    if closed > 1:
        return f": training closed all of the jump ({closed:.0%}: it ended below the intact model, which was not trained)"
    return f": training closed {closed:.0%} of the jump" if closed > 0 else ": training closed none of the jump"
