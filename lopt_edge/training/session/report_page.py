"""report.html of a run: what it is, how it goes, and what came out, in one file that any browser shows.

Written at each evaluation, so that a long run can be watched, and at the end. The rules: every figure is one of the logs or
of the run's record; a report that cannot be written ends no run; and it costs little: the log is read line by line into a
few hundred points, and the picture of a step's memory is drawn only at the end, when the step's memory is given back.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from lopt_edge.errors import RunError
from lopt_edge.pictures.curves import Series, curves
from lopt_edge.pictures.html import bullets, document, figure, table, words
from lopt_edge.plan.search.pictured import predicted_picture
from lopt_edge.plan.search.run_plan import described, summary
from lopt_edge.system.files import write_text
from lopt_edge.system.memory import ram_bytes
from lopt_edge.system.versions import versions
from lopt_edge.training.checkpoint.log_curves import CHOICES, NAMES, Curves, read_curves, smoothed
from lopt_edge.training.checkpoint.output_folder import METRICS_NAME, REPORT_NAME, SETTINGS_NAME
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.told import six_facts
from lopt_edge.training.session.progress import Progress
from lopt_edge.units import format_bytes

CHOICE_TITLES = {
    "rewards_margin": "By how much chosen replies are rewarded more",
    "rewards_accuracy": "Share of pairs whose chosen reply is rewarded more",
}


def write_report(inputs: Inputs, state: RunState, progress: Progress, *, finished: bool = False) -> None:
    """Write the report as the run stands; a disk that takes none is told, and the run goes on."""
    output = Path(inputs.config.output)
    try:
        found = read_curves(output / METRICS_NAME, n_steps=inputs.n_steps)
        write_text(output / REPORT_NAME, page(inputs, state, found, finished=finished))
    except (OSError, RunError) as error:
        progress.warn(f"no report was written: {error}")


def page(inputs: Inputs, state: RunState, found: Curves, *, finished: bool) -> str:
    """The report's HTML."""
    name = Path(inputs.config.output).name
    where = "finished" if finished else f"after step {state.steps} of {inputs.n_steps}"
    skipped = [f"{found.skipped} batches with numbers that are not finite were skipped"] if found.skipped else []
    plan = inputs.run_plan
    parts = [
        f"<h1>{words(name)}</h1>",
        f"<p>{words(_lead(inputs, state, where))}</p>",
        *table([["", ""], *map(list, six_facts(inputs))], "the run", kind="settings"),
        *bullets("", [*skipped, *inputs.warnings]),
        "<h2>Curves</h2>",
        '<div class="plots">',
        *_curves(inputs, found),
        "</div>",
        *_results(inputs, state),
        *_samples(state),
        "<h2>Memory</h2>",
        *_memory(inputs, finished=finished),
        "<h2>Plan</h2>",
        *bullets("", [*summary(plan), described(plan.knobs), f"plan {plan.plan_hash}", *inputs.reasons[:3]]),
        "<h2>Where it ran, and how to run it again</h2>",
        *table([["", ""], *_environment(inputs)], "environment", kind="settings"),
        f"<pre>{words(command())}</pre>",
        f"<p>{words(f'The settings as given ({SETTINGS_NAME}):')}</p>",
        f"<pre>{words(_settings(inputs))}</pre>",
    ]
    return document(f"{name}: {where}", parts)


def _lead(inputs: Inputs, state: RunState, where: str) -> str:
    losses = []
    for name, label in NAMES.items():
        if name in state.before and name in (now := state.after or state.before):
            losses.append(f"{label} from {state.before[name]:.4f} to {now[name]:.4f}")
    train = f"{state.tokens:,} tokens seen"
    return "; ".join([where, *losses, train, f"peak {format_bytes(max(state.peak_device_bytes, 0))}"])


def _curves(inputs: Inputs, found: Curves) -> Iterator[str]:
    steps = Series("steps", found.loss, 0, faint=True)
    mean = Series("training loss, smoothed", smoothed(found.loss), 0)
    held_out = Series("held-out loss", found.evaluated.get("eval_loss", []), 1)
    nothing = "No step was logged yet."
    yield from figure("Loss", curves([steps, mean, held_out], title="training and held-out loss"), nothing=nothing)
    if found.choices:
        for name, label in CHOICES.items():
            of_steps = Series("training, smoothed", smoothed(found.choices.get(name, [])), 0)
            of_rest = Series("held out", found.choices.get(f"eval_{name}", []), 1)
            picture = curves([of_steps, of_rest], title=label)
            if name in found.choices or f"eval_{name}" in found.choices:
                yield from figure(CHOICE_TITLES[name], picture, nothing=nothing)
    retention = Series("retention loss", found.evaluated.get("retention_loss", []), 2)
    picture = curves([retention], title="loss on other text")
    yield from figure("What is forgotten", picture, nothing="There is no retention_data.")
    rate = curves([Series("learning rate", found.rate, 3)], title="learning rate", zero=True)
    yield from figure("Learning rate", rate, nothing=nothing)
    speed = curves([Series("tokens a second", found.speed, 4)], title="tokens a second", zero=True)
    yield from figure("Speed", speed, nothing=nothing)
    budget, mib = inputs.run_plan.budget_bytes["device"], 1 << 20
    taken = [(x, y / mib) for x, y in found.device_bytes]
    most = max((y for _, y in taken), default=0.0)
    limit = budget / mib if budget is not None and budget / mib <= 2 * most else None
    text = "" if limit is None else "; dashed: the budget"
    memory = curves([Series("MiB", taken, 5)], title="peak device memory so far", limit=limit, zero=True)
    yield from figure(f"Peak device memory so far, in MiB{text}", memory, nothing=nothing)


def _results(inputs: Inputs, state: RunState) -> Iterator[str]:
    now = state.after or {}
    rows = [
        [label, f"{inputs.evaluated[name].n_supervised:,}", f"{state.before[name]:.4f}", f"{now[name]:.4f}"]
        for name, label in NAMES.items()
        if name in now and name in state.before
    ]
    if rows:
        yield "<h2>Losses</h2>"
        yield from table([["", "tokens", "before", "now"], *rows], "mean over the scored tokens")


def _samples(state: RunState) -> Iterator[str]:
    if state.samples:
        yield '<h2>Samples</h2><div class="two">'
        for when, text in state.samples.items():
            yield f'<div><h3>{words(when)}</h3><p class="sample">{words(text)}</p></div>'
        yield "</div>"


def _memory(inputs: Inputs, *, finished: bool) -> Iterator[str]:
    plan = inputs.run_plan
    rows = [
        [tier, format_bytes(plan.peak_bytes[tier]), "" if limit is None else format_bytes(limit)]
        for tier, limit in plan.budget_bytes.items()
        if plan.peak_bytes[tier] or limit is not None
    ]
    yield from table([["tier", "predicted peak", "budget"], *rows], "memory, by tier")
    total = sum(plan.items.values()) or 1
    items = [[name, format_bytes(n), f"{n / total:.0%}"] for name, n in plan.items.items() if n]
    yield from table([["what", "bytes", "share"], *items], f"the device's peak as predicted, at {plan.peak_op}")
    if finished:
        title = f"{inputs.source.facts.architecture}, {inputs.config.method}: the largest step, predicted"
        picture = predicted_picture(inputs.predict(), title=title, budget_bytes=plan.budget_bytes["device"])
        yield f'<div class="picture" tabindex="0" role="region" aria-label="memory of a step">{picture}</div>'


def _environment(inputs: Inputs) -> Iterator[list[str]]:
    yield ["device", f"{inputs.device}, compute dtype {str(inputs.dtype).removeprefix('torch.')}"]
    yield ["machine", f"{platform.platform()}, {os.cpu_count()} cores, {format_bytes(ram_bytes())} of memory"]
    yield ["Python", platform.python_version()]
    yield ["packages", ", ".join(f"{name} {value}" for name, value in versions().items())]


def command() -> str:
    """The command line that this process was started with, or that it was called from Python."""
    program = Path(sys.argv[0]).name
    if program.startswith("lopt-edge"):
        return shlex.join(["lopt-edge", *sys.argv[1:]])
    return f"from Python: lopt_edge.finetune(load_config({SETTINGS_NAME!r}))"


def _settings(inputs: Inputs) -> str:
    try:
        return (Path(inputs.config.output) / SETTINGS_NAME).read_text(encoding="utf-8")
    except OSError:
        return "(config.yaml is gone)"
