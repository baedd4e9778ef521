"""What a run takes in the processes of a pipeline: the planner's answer for one process, reckoned again for each part.

The search (search.py) chooses the knobs as if one process ran the whole step; here each process' own plan is replayed with
those knobs, and the clocks are chained: a process waits for the boundaries that the one before has sent. On a CPU the
processes share RAM, so the device's bytes are their sum; each is reckoned at the machine's full rate, which is too good
where they share cores. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lopt_edge.plan.budget import format_bytes
from lopt_edge.plan.knobs import Knobs
from lopt_edge.plan.pipeline import Part
from lopt_edge.plan.run_plan import RunPlan
from lopt_edge.plan.search import three_digits
from lopt_edge.plan.seconds import step_seconds
from lopt_edge.plan.workload import Workload


def in_processes(
    whole: RunPlan, workload: Workload, knobs: Knobs, parts: Sequence[Part]
) -> tuple[RunPlan, tuple[str, ...]]:
    """The answer with peaks, seconds and speed of all processes, and in words what each takes. Where the sum does not fit
    what is free, that is said; the knobs stay."""
    found = [replace(workload, part=part) for part in parts]
    predictions = [one.predict(knobs) for one in found]
    each, add = [one.device_bytes for one in predictions], sum if workload.shape.device_type == "cpu" else max
    seconds, arrivals = 0.0, dict[int, float]()
    for one in found:
        own, sizes = one.arranged(knobs, len(workload.batches)), one.sizes(knobs)
        seconds = max(seconds, step_seconds(own, sizes, workload.batches, workload.profile, arrivals).seconds)
    peaks = {**whole.peak_bytes, "device": add(each), "disk": sum(one.disk_bytes for one in predictions)}
    listed = ", ".join(f"{part.text()} {format_bytes(n)}" for part, n in zip(parts, each, strict=True))
    reasons = [f"pipeline of {len(parts)}: {listed}"]
    budget = whole.budget_bytes["device"]
    if budget is not None and peaks["device"] > budget:
        reasons.append(f"together they may take {format_bytes(peaks['device'])}, more than the {format_bytes(budget)} that "
                       "are free: page more (--weights, --saved-inputs), or take fewer processes")  # fmt: skip
    plan = replace(whole, peak_bytes=peaks, step_seconds=three_digits(seconds),
                   tokens_per_second=workload.n_tokens / seconds)  # fmt: skip
    return plan, tuple(reasons)
