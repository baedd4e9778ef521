"""`--boundary auto`: where LoPT's boundaries lie, and how many there are, chosen by short runs on the user's own data.

The paper (arXiv 2605.04913) leaves open where to cut. Each candidate (a quarter, a half, three quarters of the depth; two
boundaries at the thirds) trains from the same start for the same few steps; what it earns is the held-out loss that it
takes away per second of a step and GiB of device memory, both as the planner predicts them: so the choice is a function of
model, data and settings, and not of what else the machine does (the measured seconds are shown beside). Candidates that do
not fit the budget are left out. The table is printed, and kept in `boundary.json`; the run then is one with those
boundaries, as if they had been given, so a resumed run probes nothing.

The short runs are made in this process, which grows with the first one: so the libraries' bytes are those before any of
them, for all candidates.

It is a short look: a few steps at the beginning of the schedule, and one seed. It does not look at lr_local or the local
loss.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from lopt_edge.adapters.base import RUN_NAME
from lopt_edge.config.settings import Config
from lopt_edge.errors import DoesNotFit, InputError, Interrupted, RunError
from lopt_edge.training.checkpoint.output_folder import METRICS_NAME
from lopt_edge.training.prepare.read import read_inputs
from lopt_edge.training.session.progress import Progress
from lopt_edge.units import format_bytes

LEAST_STEPS, MOST_STEPS, STEPS_SHARE = 8, 50, 10  # of a candidate; one part in so many of the run's steps
MOST_ROWS, MOST_SHARE = 64, 0.1  # held out of the data for the probe, where the run holds out nothing
QUIET = {"boundary": None, "resume": None, "eval_every": None, "keep_best": False, "retention_data": None,
         "sample_prompt": None, "system": None, "save_every": None, "save_minutes": 0.0, "memory_report": None,
         "dry_run": False, "overwrite": False, "patience": None, "track": None}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """One candidate: its boundaries, its held-out loss before and after, and what its steps take.

    `earned` is the fall of the held-out loss per second and GiB as predicted; None where it could not be measured.
    `measured_seconds` is the median of a step.
    """

    boundary_layers: tuple[int, ...]
    before: float | None = None
    after: float | None = None
    step_seconds: float | None = None
    measured_seconds: float | None = None
    device_bytes: int | None = None
    earned: float | None = None
    note: str = ""

    def text(self) -> str:
        """The candidate in a line: what it earned, or why it could not be measured."""
        name = f"boundary {', '.join(map(str, self.boundary_layers))}"
        if self.earned is None:
            return f"{name}: {self.note}"
        assert self.before is not None and self.after is not None and self.device_bytes is not None
        return (
            f"{name}: held-out loss {self.before:.4f} -> {self.after:.4f}, {self.step_seconds:.3g} s a step "
            f"({self.measured_seconds:.3g} measured), {format_bytes(self.device_bytes)}; earned {self.earned:.4g} per "
            "GiB and second"
        )


def candidates(n_layers: int) -> list[tuple[int, ...]]:
    """The boundary layers to try, the halves first, so that they win where nothing differs."""
    found: list[tuple[int, ...]] = [(round(n_layers / 2),), (round(n_layers / 4),), (round(3 * n_layers / 4),)]
    found.append((round(n_layers / 3), round(2 * n_layers / 3)))
    inside = [one for one in found if all(0 < layer < n_layers for layer in one) and len(set(one)) == len(one)]
    return list(dict.fromkeys(inside))


def choose_boundary(config: Config, run: Callable[[Config], Any], progress: Progress) -> tuple[Config, list[Probe]]:
    """The settings with the boundaries that earned most, and what all candidates did.

    `run` is `finetune`, called for each candidate. Raises InputError if no candidate could be measured.
    """
    inputs, _ = read_inputs(config.model_copy(update={**QUIET, "force": True}))
    n_steps = max(LEAST_STEPS, min(MOST_STEPS, inputs.n_steps // STEPS_SHARE))
    quiet: dict[str, Any] = {**QUIET, "max_steps": n_steps}
    if not config.eval_data and not config.eval_fraction:
        quiet["eval_fraction"] = min(MOST_SHARE, MOST_ROWS / inputs.train.n_units)
    found: list[Probe] = []
    names = candidates(inputs.source.facts.n_layers)
    progress.note(f"boundary auto: {len(names)} candidates, {n_steps} steps each")
    for boundary_layers in names:
        probe = _probe(config.model_copy(update={**quiet, "boundary_layers": boundary_layers}), run)
        found.append(_valued(probe, library_bytes=inputs.workload.library_bytes))
        progress.note(found[-1].text())
    measured = [probe for probe in found if probe.earned is not None]
    if not measured:
        raise InputError(
            "no boundary could be measured: " + "; ".join(probe.text() for probe in found),
            where="boundary",
            fix="allow more memory, lower --lr, or name --boundary-layers",
        )
    best = max(measured, key=lambda probe: probe.earned or 0.0)
    layers = ", ".join(map(str, best.boundary_layers))
    progress.note(f"boundary chosen: {layers} (it earned most: {best.earned:.4g} per GiB and second)")
    return config.model_copy(update={"boundary": None, "boundary_layers": best.boundary_layers}), found


def _probe(config: Config, run: Callable[[Config], Any]) -> Probe:
    """A short run in a folder of its own, which is removed."""
    assert config.boundary_layers is not None
    parent = next(path for path in Path(config.output).resolve().parents if path.is_dir())
    try:
        folder = tempfile.TemporaryDirectory(prefix=".boundary-probe-", dir=parent)
    except OSError as error:
        raise InputError(
            f"auto makes its short runs in a folder beside the output, and {parent} takes none: {error.strerror}",
            where="boundary",
            fix="choose another output, or name --boundary-layers",
        ) from None
    with folder as root:
        output = Path(root) / "run"
        try:
            run(config.model_copy(update={"output": str(output)}))
        except DoesNotFit:
            return Probe(config.boundary_layers, note="does not fit the memory budgets")
        except RunError as error:
            return Probe(config.boundary_layers, note=f"failed ({str(error).splitlines()[0]})")
        except Interrupted as stop:
            raise Interrupted(stop.signal_number, "nothing was trained yet; begin again with the same command") from None
        values = json.loads((output / RUN_NAME).read_text())
        lines = [json.loads(line) for line in (output / METRICS_NAME).read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    measured = median([line["step_seconds"] for line in lines if "step_seconds" in line][1:])
    predicted = values["predicted"]
    n_bytes = predicted["device_bytes"] - predicted["library_bytes"]
    return Probe(config.boundary_layers, losses[0], losses[-1], predicted["step_seconds"], measured, n_bytes)


def _valued(probe: Probe, *, library_bytes: int) -> Probe:
    """The probe with the libraries' bytes and what it earned; unchanged if it could not be measured."""
    if probe.before is None or probe.after is None or probe.step_seconds is None or probe.device_bytes is None:
        return probe
    device_bytes = probe.device_bytes + library_bytes
    earned = (probe.before - probe.after) / (probe.step_seconds * device_bytes / 2**30)
    return replace(probe, device_bytes=device_bytes, earned=earned)


def as_json(found: list[Probe]) -> list[dict[str, Any]]:
    """The content of `boundary.json`: one object a candidate."""
    return [asdict(probe) for probe in found]
