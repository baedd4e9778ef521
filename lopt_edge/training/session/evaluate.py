"""What a session measures beside its steps: the held-out and the retention loss, and a completion of the sample prompt.

The rules: losses that are no numbers end the run; with --keep-best the adapter is saved before its loss is logged, so that
what fails in between is evaluated again; a stage of SegProp is evaluated as the network that it is. What an evaluation
changes in the run's state is returned, and session.py writes it down. The losses' arithmetic is run/step/evaluation.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lopt_edge.adapters.generation import Sampling, TextGenerator, asked
from lopt_edge.adapters.save import save_adapter
from lopt_edge.errors import RunError
from lopt_edge.run.step.evaluation import losses
from lopt_edge.run.step.op_faults import memory_faults
from lopt_edge.system.files import JsonLines
from lopt_edge.training.prepare.reference import HELD_OUT
from lopt_edge.training.session.loaded import Loaded, RunContext
from lopt_edge.training.session.step_kinds import Stage

SAMPLE = Sampling(max_new_tokens=48)


@dataclass(frozen=True)
class Evaluation:
    """The losses by name; `is_best`: they are those of the best adapter, which was saved; what the stage came to."""

    losses: dict[str, float]
    is_best: bool
    stage: Stage | None


def evaluate(
    loaded: Loaded,
    context: RunContext,
    log: JsonLines,
    *,
    step: int,
    best: Mapping[str, float] | None,
    between: Callable[[], None],
) -> Evaluation:
    """Measure and log held-out and retention loss; with --keep-best the best adapter so far goes to the output folder.

    `between` is called before each batch. Raises RunError for a loss that is not finite.
    """
    config = loaded.inputs.config
    with context.clock.phase("evaluate"), memory_faults("evaluation"):
        found = _losses(loaded, step, between)
    for name, loss in found.items():
        if not math.isfinite(loss):
            raise RunError(f"{name} is {loss}", where=f"step {step}", fix="lower --lr; check the base model")
    better = step > 0 and "eval_loss" in found and (best is None or found["eval_loss"] < best["eval_loss"])
    is_best = config.keep_best and better
    if is_best:  # before the log: what fails here is evaluated again, and must not be logged
        save_adapter(Path(config.output), loaded.model, loaded.shape, plain=True)
    if found:
        log.write({"step": step, **found})
        context.progress.evaluated(step, found)
    stage = loaded.kinds.stage_after(step, found.get("eval_loss"))
    if stage is not None and stage.over:
        context.progress.note(stage.over)
        context.events.write({"event": "stage ended", "step": step, "reason": stage.over})
    return Evaluation(found, is_best, stage)


def _losses(loaded: Loaded, step: int, between: Callable[[], None]) -> dict[str, float]:
    """The losses by name; of held-out preferences the objective's, and what is measured of them."""
    layers, batches = loaded.kinds.layers(step), dict(loaded.evaluated)
    found = {}
    if loaded.chosen is not None and (chosen := batches.pop(HELD_OUT, None)) is not None:
        measured = loaded.chosen.held_out(loaded.model, chosen, between=between, layers=layers)
        found = {f"eval_{name}": value for name, value in measured.items()}
    tile = loaded.inputs.knobs.token_tile
    if (leader := loaded.leader) is not None:
        return found | leader.held_out(loaded.model, batches, token_tile=tile, between=between, layers=layers)
    return found | losses(loaded.model, batches, token_tile=tile, between=between, layers=layers, link=loaded.link)


def sample(loaded: Loaded, context: RunContext) -> str | None:
    """A completion of the sample prompt; None where the settings name none."""
    prompt, template = loaded.inputs.config.sample_prompt, loaded.inputs.template
    if prompt is None:
        return None
    generator = TextGenerator(loaded.model, loaded.inputs.tokenizer, template)
    with context.clock.phase("sample"), memory_faults("sampling"):
        if template is None:
            return generator.continue_text(prompt, SAMPLE)
        return generator.reply(asked(prompt, loaded.inputs.config.system), SAMPLE)
