"""Equal seconds: how many steps each variant gets, so that all of them train for as long as the first one does.

The rule: the seconds are the planner's, for this data on this machine (planning/duration.py), since measured ones would
make another study each time; so cheap variants get more steps, dear ones fewer, and each has the learning-rate schedule of
its own number of steps. What was found is kept beside the tables, and taken from there by the same command, whatever the
machine does by then. Seconds of evaluations are not counted: they are the same for all.

Equal bytes need nothing of this kind: state `device_memory` in the config file, which all variants share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lopt_edge.comparison.variants import Variant, resolve
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError

STEPS_NAME = "equal-seconds.json"
ROUNDS = 3  # other steps are other epochs, and so another share of steps that read a cache


def equal_steps(base: Config, variants: Sequence[Variant], *, lr: float, folder: Path) -> dict[str, int]:
    """The steps of each variant by its name; the first variant has the config's. Raises InputError(s)."""
    found = kept_steps(folder, variants[0].name)
    missing = [variant for variant in variants if variant.name not in found]
    if not missing:
        return found
    n_steps, seconds = _duration(resolve(variants[0], lr, base=base, common={}))
    if found.get(variants[0].name, n_steps) != n_steps:
        what = f"was made for {found[variants[0].name]} steps of {variants[0].name}, not {n_steps}"
        raise InputError(what, where=str(folder / STEPS_NAME), fix="choose another --output")
    for variant in missing:
        steps = n_steps
        for _ in range(0 if variant is variants[0] else ROUNDS):
            _, own = _duration(resolve(variant, lr, base=base, common={"max_steps": steps}))
            steps = max(1, round(steps * seconds / own))
        found[variant.name] = steps
    return found


def _duration(config: Config) -> tuple[int, float]:
    """The steps of a run and the planner's seconds for them, on its own data."""
    from lopt_edge.planning.worst_case import answer, question  # not above: this loads torch and a tokenizer
    from lopt_edge.training.prepare.plan_data import read_data

    data = read_data(config)
    asked = question(config, largest=data.largest)
    expected = data.duration(asked, answer(asked))
    if expected is None:
        raise InputError(f"needs a model and data on this machine: {data.why_not}", where="--equal", fix="fetch them first")
    return expected.n_steps, expected.train_seconds


def kept_steps(folder: Path, reference: str) -> dict[str, int]:
    """The steps that an earlier comparison to the same variant found; none where there are none."""
    try:
        values = json.loads((folder / STEPS_NAME).read_text(encoding="utf-8"))
        steps = {str(name): int(n) for name, n in values["steps"].items()} if values["reference"] == reference else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return steps if all(n > 0 for n in steps.values()) else {}


def steps_text(reference: str, steps: Mapping[str, int]) -> str:
    """The file's text."""
    return json.dumps({"reference": reference, "steps": dict(steps)}, indent=1) + "\n"
