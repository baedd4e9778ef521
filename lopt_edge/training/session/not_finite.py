"""What is kept of a batch whose loss or gradient is not finite: which examples, and the op where it began.

`not-finite-step-N.json` in the output folder names the examples by index and by their place in the data file, so that a
person can look at them. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lopt_edge.data import Window
from lopt_edge.errors import NotFinite
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.step.diagnosis import first_not_finite
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.step_state import Rates
from lopt_edge.system.files import write_json
from lopt_edge.training.prepare.inputs import Inputs


def dump_not_finite(
    inputs: Inputs,
    executor: Executor,
    *,
    step: int,
    window: Window,
    batches: Sequence[Batch],
    plan: Plan,
    rates: Rates,
    align_weight: float,
    error: NotFinite,
) -> tuple[Path, str]:
    """Write the file about a batch that is not finite; returns its path, and the text of the op where it began."""
    op = error.op
    if not plan.has_early_steps and executor.link is None:  # a pipeline's processes say it when they agree
        op = (
            first_not_finite(executor, plan, batches, step=step, learning_rates=rates, align_weight=align_weight)
            or error.op
        )
    examples = inputs.train.examples
    file = Path(inputs.config.output) / f"not-finite-step-{step}.json"
    write_json(
        file,
        {
            "step": step,
            "op": op,
            "found_at": error.op,
            "reason": str(error).split("\n")[0],
            "micro_batches": [[{"index": i, "where": examples[i].where} for i in indices] for indices in window],
        },
    )
    return file, op
