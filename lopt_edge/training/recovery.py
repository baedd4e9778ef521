"""After a step for which memory ran out: the planner's next plan.

The next plan is the fastest one that is predicted to take a tenth less device memory than the last, or the smallest one if
none does, among the same combinations as before (so whatever the user fixed stays fixed). These settings change no bit
(design law 3). Where no combination takes less, micro-batches are split, or rows of packed sequences cut shorter: equal up
to rounding (law 5), and reported. Where that cannot be either, there is no next plan. The run then goes on from the
checkpoint of the step's start (run.py).
"""

from __future__ import annotations

from dataclasses import replace

from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.search.run_plan import described, make_run_plan
from lopt_edge.plan.search.search import Search
from lopt_edge.planning.question import search_for
from lopt_edge.planning.settings import smaller_micro_batches
from lopt_edge.training.prepare.inputs import Inputs

STEP = 0.9  # of the predicted bytes of the plan that failed
MOST_PLANS = 3
LEAST = 0.99  # of a step's tensors: what is not at least that much less is no smaller plan


def smaller_plan(inputs: Inputs) -> tuple[Inputs, str] | None:
    """The inputs with the next smaller plan, and a sentence about it; None if there is none."""
    before = inputs.predict()
    search = _search(inputs)
    allowed = replace(inputs.budget, device_bytes=round(STEP * before.device_bytes))
    if search.within(allowed).best is not None:
        return _with(inputs, search, allowed, "")
    least = search.smallest.prediction.timeline.peak_bytes
    if least < LEAST * before.timeline.peak_bytes:
        return _with(inputs, search, allowed, "")
    for smaller, what in smaller_micro_batches(inputs.config):
        split = replace(inputs, config=smaller)
        search = _search(split)
        if search.smallest.prediction.timeline.peak_bytes < LEAST * least:  # rows may be as short as they can be
            return _with(split, search, allowed, f"{what} (gradients equal up to rounding, 1e-5 of their norm); ")
    return None


def _search(inputs: Inputs) -> Search:
    """The planner's search for the run as it stands; the token tile is fixed, since another one changes bits."""
    config = inputs.config.model_copy(update={"token_tile": inputs.knobs.token_tile})  # another tile changes bits
    return search_for(config, inputs.ground)


def _with(inputs: Inputs, search: Search, allowed: Budget, note: str) -> tuple[Inputs, str]:
    run_plan = make_run_plan(search, allowed, notes=("after a step that memory did not hold",), brief=True)
    assert run_plan.chosen is not None
    chosen = run_plan.chosen
    run_plan = replace(run_plan, chosen=None, fits=chosen.prediction.fits(inputs.budget))  # what is enforced stays the same
    found = replace(inputs, knobs=chosen.knobs, workload=search.workload, run_plan=run_plan)
    return found, f"{note}next plan: {described(run_plan.knobs)}"
