"""What a session measures beside its steps: the held-out and the retention loss, and a completion of the sample prompt.

Each takes the session, which says what is evaluated and where it is logged. The rules: losses that are no numbers end the
run; with --keep-best the adapter is saved before its loss is logged, so that what fails in between is evaluated again; a
stage of SegProp is evaluated as the network that it is. Training is session.py's matter, the losses' arithmetic
run/step/evaluation.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lopt_edge.adapters.generation import Sampling, Speaker
from lopt_edge.adapters.save import save_adapter
from lopt_edge.errors import RunError
from lopt_edge.run.step.evaluation import held_out_loss
from lopt_edge.run.step.op_faults import memory_faults

if TYPE_CHECKING:
    from lopt_edge.training.session.session import Session

SAMPLE = Sampling(max_new_tokens=48)


def evaluate(session: Session, step: int) -> dict[str, float]:
    """Held-out and retention loss, logged; with --keep-best the best adapter so far goes to the output folder."""
    state, keeps = session.state, session.config.keep_best
    with session.clock.phase("evaluate"), memory_faults("evaluation"):
        found = losses(session, layers=session.kinds.layers(step))
    for name, loss in found.items():
        if not math.isfinite(loss):
            raise RunError(f"{name} is {loss}", where=f"step {step}", fix="lower --lr; check the base model")
    better = step and "eval_loss" in found and (state.best is None or found["eval_loss"] < state.best["eval_loss"])
    if keeps and better:  # before the log: what fails here is evaluated again, and must not be logged
        save_adapter(session.output, session.model, session.shape, plain=True)
    if found:
        session.log.write({"step": step, **found})
        session.progress.note(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    if (over := session.kinds.stage_over(step, found.get("eval_loss"))) is not None:
        session.progress.note(over)
        session.events.write({"event": "stage ended", "step": step, "reason": over})
    state.evaluated, state.best = step, found if keeps and better else state.best
    return found


def losses(session: Session, *, layers: Sequence[int] | None = None) -> dict[str, float]:
    """Of the model as it stands (or of these layers), on the held-out and the retention data."""
    tile, check = session.inputs.knobs.token_tile, session.interrupts.check
    named = (("eval_loss", session.held_out), ("retention_loss", session.retention))
    return {
        name: held_out_loss(session.model, batches, token_tile=tile, layers=layers, between=check, link=session.link)
        for name, batches in named
        if batches
    }


def sample(session: Session, when: str) -> None:
    """A completion of the sample prompt, if there is one."""
    prompt, template = session.config.sample_prompt, session.inputs.template
    if prompt is None:
        return
    speaker = Speaker(session.model, session.inputs.tokenizer, template)
    with session.clock.phase("sample"), memory_faults("sampling"):
        session.state.samples[when] = (
            speaker.reply([("user", prompt)], SAMPLE) if template is not None else speaker.continue_text(prompt, SAMPLE)
        )
