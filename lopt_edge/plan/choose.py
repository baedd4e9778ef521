"""Which knobs a run takes: what the user said, and the defaults or the ladder for the rest; each choice with its reason.

`auto` means: everything on the device, one layer recomputed at a time. If budgets are given, the first rung of a fixed
ladder that fits them, from the fastest to the smallest (`fits` is the caller's: it predicts a plan's peaks). The order of
the rungs follows from measurements on a CPU, Qwen2.5-0.5B shape, 512 tokens: keeping graphs saves a third of a step's time;
streaming weights, saved inputs, states and gradients from disk costs under 2% each and frees, in this order, the most.
Knobs that the user fixed stay as they are on every rung.

What contradicts itself is refused here, all mistakes together; what has no effect is said. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lopt_edge.config import Config
from lopt_edge.errors import InputError, raise_collected
from lopt_edge.plan.facts import ModelFacts
from lopt_edge.plan.knobs import ACTIVATIONS, WEIGHTS, Knobs, Tier, default_knobs, per_layer

Fits = Callable[[Knobs], list[str]]  # what is too small for these knobs; nothing if they fit


@dataclass(frozen=True)
class Choice:
    """The knobs, and why they are so."""

    knobs: Knobs
    reason: str


def check_memory_settings(config: Config, facts: ModelFacts, *, device_type: str) -> None:
    """Raise InputError(s) for memory settings that cannot be or contradict each other."""
    errors: list[InputError] = []
    for name, choices in (("weights", WEIGHTS), ("activations", ACTIVATIONS)):
        text = getattr(config, name)
        try:
            if text != "auto" and "host" in per_layer(text, choices, n_layers=facts.n_layers, where=name):
                errors += _host_without_gpu(name, device_type)
        except InputError as error:
            errors.append(error)
    for name in ("saved_inputs", "optimizer_states", "gradients"):
        errors += _host_without_gpu(name, device_type) if getattr(config, name) == "host" else []
    for name in ("host_memory", "pinned_memory"):
        if device_type == "cpu" and getattr(config, name) is not None:
            errors.append(InputError("there is no host tier without a GPU: RAM is the device", where=name,
                                     fix="state --device-memory"))  # fmt: skip
    if config.apply == "layer" and config.clip:
        errors.append(InputError("layer needs clip 0: a layer is updated before the norm of the others is known",
                                 where="apply", fix="add --clip 0, or use --apply segment"))  # fmt: skip
    if config.apply == "layer" and config.grad_accum > 1:
        errors.append(InputError(f"layer needs grad_accum 1, not {config.grad_accum}: a layer's gradients are complete "
                                 "only in the last micro-batch", where="apply", fix="add --grad-accum 1"))  # fmt: skip
    if config.apply == "segment" and config.clip and config.clip_scope == "global":
        errors.append(InputError("segment needs clip_scope segment: the global norm is known only at the step's end",
                                 where="apply", fix="use --clip-scope segment, --clip 0 or --apply step"))  # fmt: skip
    raise_collected(errors)


def _host_without_gpu(name: str, device_type: str) -> list[InputError]:
    if device_type != "cpu":
        return []
    return [InputError("host is refused: on a machine without GPU the device is RAM", where=name, fix="use disk")]


def choose_knobs(config: Config, facts: ModelFacts, *, device_type: str, fits: Fits | None = None) -> Choice:
    """The knobs of a run. `fits` judges a rung; without it (no budget was given) the defaults are taken.

    Raises InputError for settings that cannot be, and if not even the last rung fits.
    """
    check_memory_settings(config, facts, device_type=device_type)
    fixed = fixed_knobs(config, facts)
    plain = replace(default_knobs(facts, device_type), **fixed)
    if fits is None:
        return Choice(plain, "defaults; no memory budget was given")
    misfits: list[str] = []
    for name, rung in ladder(facts, device_type):
        knobs = replace(rung, **fixed)
        misfits = fits(knobs)
        if not misfits:
            return Choice(knobs, f"the fastest rung that fits the budgets: {name}")
    raise InputError(f"no setting fits the memory budgets; the smallest one: {'; '.join(misfits)}", where="device_memory",
                     fix="raise the budget, or lower --max-seq-len, --batch-size or --lora-r")  # fmt: skip


def fixed_knobs(config: Config, facts: ModelFacts) -> dict[str, Any]:
    """What the user said, as knob values."""
    n_layers = facts.n_layers
    found: dict[str, Any] = {"optimizer": config.optimizer, "apply": config.apply, "prefetch": config.prefetch}
    if config.weights != "auto":
        found["weights"] = per_layer(config.weights, WEIGHTS, n_layers=n_layers, where="weights")
    if config.activations != "auto":
        found["activations"] = per_layer(config.activations, ACTIVATIONS, n_layers=n_layers, where="activations")
    tiers = {"saved_inputs": config.saved_inputs, "states": config.optimizer_states, "gradients": config.gradients}
    return found | {name: tier for name, tier in tiers.items() if tier != "auto"}


def ladder(facts: ModelFacts, device_type: str) -> Iterator[tuple[str, Knobs]]:
    """(name, knobs) from the fastest to the smallest."""
    n_layers = facts.n_layers
    below: tuple[Tier, ...] = ("disk",) if device_type == "cpu" else ("host", "disk")
    start = default_knobs(facts, device_type)
    yield "all resident, graphs kept", replace(start, activations=("keep",) * n_layers, pages=below[0])
    yield "all resident", replace(start, pages=below[0])
    for tier in below:
        knobs = replace(start, pages=tier, saved_inputs=tier)
        yield f"saved inputs on {tier}", knobs
        if device_type != "cpu":
            knobs = replace(knobs, head="disk")
            yield f"saved inputs on {tier}, lm_head in chunks", knobs
        for n_resident in (n_layers * 3 // 4, n_layers // 2, n_layers // 4, 0):
            streamed = replace(knobs, weights=("resident",) * n_resident + (tier,) * (n_layers - n_resident))
            yield f"saved inputs and {n_layers - n_resident} layers' weights on {tier}", streamed
        knobs = replace(knobs, weights=(tier,) * n_layers, states=tier)
        yield f"saved inputs, weights and optimizer states on {tier}", knobs
        yield f"everything on {tier}", replace(knobs, gradients=tier)


def memory_warnings(config: Config, knobs: Knobs) -> Iterator[str]:
    """One sentence for each memory setting that changes nothing in this combination."""
    tiers = {*knobs.weights, knobs.saved_inputs, knobs.states, knobs.gradients}
    moves = tiers - {"device", "resident"} or "page" in knobs.activations
    given = config.model_fields_set
    if "prefetch" in given and not moves:
        yield "prefetch has no effect: nothing is moved between tiers"
    if config.page_dir and "disk" not in tiers and "page" not in knobs.activations:
        yield "page_dir has no effect: nothing is paged to disk"
    if "saved_inputs" in given and knobs.saved_inputs != "device" and "recompute" not in knobs.activations:
        yield "saved_inputs has no effect: no layer is recomputed from its saved input"
    if "gradients" in given and knobs.gradients != "device" and config.apply == "layer":
        yield "gradients has no effect: apply layer frees each layer's gradients at once"
