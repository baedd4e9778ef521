"""What a run takes in the processes of a pipeline: the planner's answer for one process, computed again for each part.

The search (search.py) chooses the knobs as if one process ran the whole step; here each process' own plan is replayed with
those knobs, and the clocks are chained: a process waits for the boundaries that the one before has sent. On a CPU the
processes share RAM, so the device's bytes are their sum; each is computed at the machine's full rate, which is too good
where they share cores. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lopt_edge.plan.costs.seconds import step_seconds
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.processes import Part
from lopt_edge.plan.search.run_plan import RunPlan, items
from lopt_edge.plan.search.search import Candidate, three_digits
from lopt_edge.plan.search.workload import Workload
from lopt_edge.units import format_bytes


def in_processes(
    whole: RunPlan, workload: Workload, knobs: Knobs, parts: Sequence[Part]
) -> tuple[RunPlan, tuple[str, ...]]:
    """The answer with peaks, items, seconds and speed of all processes, and in words what each takes. Where the sum does
    not fit what is free, a sentence shows it; the knobs stay. What was found beside the answer (alternatives, longest
    context) is of one process and goes."""
    found, arrivals = [], dict[int, float]()
    for part in parts:
        one = replace(workload, part=part)
        own, sizes = one.arranged(knobs, len(workload.batches)), one.sizes(knobs)
        seconds = step_seconds(own, sizes, workload.batches, workload.profile, arrivals)
        found.append((one, Candidate(knobs, seconds, one.predict(knobs))))
    each = [candidate.prediction.device_bytes for _, candidate in found]
    listed = ", ".join(f"{part.text()} {format_bytes(n)}" for part, n in zip(parts, each, strict=True))
    reasons = [f"pipeline of {len(parts)}: {listed}"]
    largest = max(range(len(parts)), key=each.__getitem__)
    counted = found if workload.shape.kind.counts_process else [found[largest]]
    device_bytes, together = sum(c.prediction.device_bytes for _, c in counted), Counter[str]()
    for one, candidate in counted:
        together.update(items(one, candidate))
    budget = whole.budget_bytes["device"]
    if budget is not None and device_bytes > budget:
        reasons.append(
            f"together they may take {format_bytes(device_bytes)}, more than the {format_bytes(budget)} that "
            "are free: page more (--weights, --saved-inputs), or take fewer processes"
        )
    seconds_most = max(candidate.seconds.seconds for _, candidate in found)
    plan = replace(
        whole,
        peak_bytes={
            **whole.peak_bytes,
            "device": device_bytes,
            "disk": sum(candidate.prediction.disk_bytes for _, candidate in found),
        },
        peak_op=f"{found[largest][1].prediction.peak_op} of process {largest}",
        items=dict(together),
        step_seconds=three_digits(seconds_most),
        tokens_per_second=workload.n_tokens / seconds_most,
        bytes_moved=sum(candidate.seconds.bytes_moved for _, candidate in found),
        alternatives=(),
        longest_context=None,
        smallest_card=None,
    )
    return plan, tuple(reasons)
