"""What a user is shown before a run begins: six facts in short lines. The long form of each is in `Inputs.reasons`.

The rule: every figure is one of the record's, or the planner's; nothing is decided here.
"""

from __future__ import annotations

from lopt_edge.data import Dataset
from lopt_edge.plan.search.run_plan import RunPlan
from lopt_edge.planning.duration import Duration, duration, in_words
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.units import format_bytes

Fact = tuple[str, str]  # its name and the words


def six_facts(inputs: Inputs) -> list[Fact]:
    """Model, data, method, device, memory and time of the run that is about to begin."""
    facts, config, train = inputs.source.facts, inputs.config, inputs.train
    batch_size, grad_accum = inputs.order
    beside = [f"{len(data.examples):,} {name}" for name, data in _named(inputs)]
    shares = f"{train.n_tokens:,} tokens, {train.n_supervised / train.n_tokens:.0%} learned"
    dtype = str(inputs.dtype).removeprefix("torch.")
    expected = run_duration(inputs)
    segments = sum(segment.has_loss for segment in inputs.course.kinds[0].segments)
    early = f", {segments} segments with a loss" if segments > 1 else ""
    units = "pairs" if train.together > 1 else "sequences"
    steps = f"{inputs.n_steps:,} steps of {batch_size} x {grad_accum} {units}"
    objective = "" if inputs.objective is None else f", objective {config.objective}"
    steps += f", packed in rows of {config.row_tokens} tokens" if config.packing else ""
    return [
        ("model", f"{inputs.source.name}: {facts.architecture}, {facts.n_layers} layers, hidden {facts.hidden_size}"),
        ("data", ", ".join([f"{len(train.examples):,} examples ({train.format})", shares, *beside])),
        ("method", f"{config.method}{early}, LoRA r {config.lora_r}{objective}; {steps}"),
        ("device", f"{inputs.device}, {dtype}"),
        ("memory", f"{_peaks(inputs.run_plan)}; {_main_knobs(inputs.run_plan)}"),
        ("time", f"about {in_words(expected.seconds)}, {expected.tokens_per_second:,.0f} tokens/s (predicted)"),
    ]


def run_duration(inputs: Inputs) -> Duration:
    """The predicted duration of the run on its own data."""
    evaluated = list(inputs.evaluated.values())
    beside = list(inputs.mismatched.values())
    return duration(
        inputs.config,
        inputs.workload,
        inputs.knobs,
        train=inputs.train,
        evaluated=evaluated,
        order=inputs.order,
        mismatched=beside,
    )


def _named(inputs: Inputs) -> list[tuple[str, Dataset]]:
    pairs = (("held out", inputs.held_out), ("for retention", inputs.retention))
    return [(name, data) for name, data in pairs if data is not None]


def _peaks(plan: RunPlan) -> str:
    parts = []
    for tier in ("device", "host", "disk"):
        n_bytes, budget = plan.peak_bytes[tier], plan.budget_bytes[tier]
        if n_bytes:
            most = f" of {format_bytes(budget)}" if budget is not None else ""
            parts.append(f"{format_bytes(n_bytes)}{most}{'' if tier == 'device' else f' on {tier}'}")
    return ("" if plan.fits else "DOES NOT FIT: ") + ", ".join(parts)


def _main_knobs(plan: RunPlan) -> str:
    """Where weights lie, and what becomes of activations."""
    return f"weights {plan.knobs['weights']}, activations {plan.knobs['activations']}"
