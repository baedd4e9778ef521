"""Equal means: what each variant may take, so that all of them train for as long, or in as much memory, as the first one.

The rule: seconds and bytes are the planner's, for this data on this machine (planning/duration.py), since measured ones
would make another study each time. Of seconds follow steps: cheap variants get more of them, dear ones fewer, and each has
the learning-rate schedule of its own number of steps. Of bytes follows a budget: `device_memory` is what the first
variant's plan takes, for all, so whatever takes more pages or recomputes, and is slower; with both, the seconds are those
within that budget. What was found is kept beside the tables, and taken from there by the same command, whatever the machine
does by then. Seconds of evaluations are not counted: they are the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.comparison.variants import Variant, resolve
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from lopt_edge.plan.search.run_plan import RunPlan
    from lopt_edge.planning.worst_case import Question
    from lopt_edge.training.prepare.plan_data import PlannedData

SECONDS, BYTES = MEANS = ("seconds", "bytes")
STEPS_NAME, BYTES_NAME = "equal-seconds.json", "equal-bytes.json"
ROUNDS = 3  # other steps are other epochs, and so another share of steps that read a cache


@dataclass(frozen=True)
class Equal:
    """What was found: the steps of each variant by its name, and the device's budget; empty and None as the config says."""

    steps: Mapping[str, int] = field(default_factory=dict)
    device_bytes: int | None = None

    def settings(self, name: str) -> dict[str, Any]:
        """The settings that follow for the runs of a variant."""
        found: dict[str, Any] = {"max_steps": self.steps[name]} if self.steps else {}
        return found | ({} if self.device_bytes is None else _budget(self.device_bytes))

    def files(self, reference: str) -> Iterator[tuple[str, str]]:
        """The names and texts of the files that keep what was found. `reference`: the first variant's name."""
        if self.steps:
            yield STEPS_NAME, json.dumps({"reference": reference, "steps": dict(self.steps)}, indent=1) + "\n"
        if self.device_bytes is not None:
            yield BYTES_NAME, json.dumps({"reference": reference, "device_bytes": self.device_bytes}, indent=1) + "\n"


def faults(asked: str, base: Config) -> Iterator[InputError]:
    """What is wrong with the means that are to be equal: a list with commas, empty where none are."""
    given = asked.split(",") if asked else []
    unknown = [name for name in given if name not in MEANS]
    if unknown or len(set(given)) < len(given):
        what = f"{unknown[0][:40]!r} is unknown" if unknown else f"{asked[:40]!r} names one twice"
        yield InputError(what, where="--equal", fix="use seconds, bytes or seconds,bytes")
    if BYTES in given and base.device_memory is not None:
        what = "bytes are equal already: the config states device_memory, which all variants share"
        yield InputError(what, where="--equal", fix="leave one of them out")


def found_means(asked: str, base: Config, variants: Sequence[Variant], *, lr: float, folder: Path) -> Equal:
    """The means of each variant, those that were kept and those that were not. Raises InputError(s)."""
    given = asked.split(",") if asked else []
    budget: dict[str, Any] = {}
    device_bytes = None
    if BYTES in given:
        first = resolve(variants[0], lr, base=base, common={})
        device_bytes = kept_bytes(folder, variants[0].name) or _device_bytes(first)
        budget = _budget(device_bytes)
    steps = equal_steps(base, variants, lr=lr, folder=folder, budget=budget) if SECONDS in given else {}
    return Equal(steps, device_bytes)


def equal_steps(
    base: Config, variants: Sequence[Variant], *, lr: float, folder: Path, budget: Mapping[str, Any]
) -> dict[str, int]:
    """The steps of each variant by its name, within a budget; the first variant has the config's. Raises InputError(s)."""
    found = kept_steps(folder, variants[0].name)
    missing = [variant for variant in variants if variant.name not in found]
    if not missing:
        return found
    n_steps, seconds = planned_duration(resolve(variants[0], lr, base=base, common={**budget}))
    if found.get(variants[0].name, n_steps) != n_steps:
        what = f"was made for {found[variants[0].name]} steps of {variants[0].name}, not {n_steps}"
        raise InputError(what, where=str(folder / STEPS_NAME), fix="choose another --output")
    for variant in missing:
        steps = n_steps
        for _ in range(0 if variant is variants[0] else ROUNDS):
            _, own = planned_duration(resolve(variant, lr, base=base, common={**budget, "max_steps": steps}))
            steps = max(1, round(steps * seconds / own))
        found[variant.name] = steps
    return found


def _budget(device_bytes: int) -> dict[str, Any]:
    return {"device_memory": f"{device_bytes}B"}


def _device_bytes(config: Config) -> int:
    """What the plan of a run takes of the device, on its own data. Raises InputError(s)."""
    _, _, found = _planned(config)
    return found.peak_bytes["device"]


def planned_duration(config: Config) -> tuple[int, float]:
    """The steps of a run and the planner's seconds for them, on its own data. Raises InputError(s)."""
    data, asked, found = _planned(config)
    expected = data.duration(asked, found)
    if expected is None:
        raise InputError(f"needs a model and data on this machine: {data.why_not}", where="--equal", fix="fetch them first")
    return expected.n_steps, expected.train_seconds


def _planned(config: Config) -> tuple[PlannedData, Question, RunPlan]:
    """The data of a run, the planner's question for it, and the answer."""
    from lopt_edge.planning.worst_case import answer, question  # not above: this loads torch and a tokenizer
    from lopt_edge.training.prepare.plan_data import read_data

    data = read_data(config)
    asked = question(config, largest=data.largest)
    return data, asked, answer(asked)


def kept_steps(folder: Path, reference: str) -> dict[str, int]:
    """The steps that an earlier comparison to the same variant found; none where there are none."""
    try:
        steps = {str(name): int(n) for name, n in _kept(folder / STEPS_NAME, "steps", reference).items()}
    except (ValueError, TypeError, AttributeError):
        return {}
    return steps if all(n > 0 for n in steps.values()) else {}


def kept_bytes(folder: Path, reference: str) -> int | None:
    """The device's budget that an earlier comparison to the same variant found; None where there is none."""
    n_bytes = _kept(folder / BYTES_NAME, "device_bytes", reference)
    return n_bytes if type(n_bytes) is int and n_bytes > 0 else None


def _kept(path: Path, key: str, reference: str) -> Any:
    """A value of a file that an earlier comparison to the same variant left; None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values[key] if values["reference"] == reference else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
