"""`--track`: a run's numbers in the trackers that people have (TensorBoard, trackio, Weights & Biases, MLflow, ...).

The rules: they are those of metrics.jsonl under its names; whether a tracker can be used is found out before anything is
read; it starts with the first number, so a refused run leaves nothing there; and one that fails (a service that is not
reached, a full disk) is told and left out from then on: the run goes on. The trackers are accelerate's own classes
(an extra), so that accounts, projects and offline modes are set as everywhere, by their environment variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError
from lopt_edge.training.session.callbacks import EvalRecord, StepRecord

PROJECT = "lopt-edge"
PACKAGES = {"comet_ml": "comet-ml"}  # where the tracker's name is not that of its package


class Trackers:
    """The trackers of a run, started with the first number."""

    def __init__(self, config: Config, classes: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self.config, self.classes, self.warn = config, classes, warn
        self.started: dict[str, Any] | None = None

    def step(self, record: StepRecord) -> None:
        """Log a step."""
        values = {"loss": record.loss, "lr": max(record.lr, default=0.0), "tokens": record.tokens}
        values |= {"step_seconds": record.seconds, "peak_device_bytes": record.peak_device_bytes}
        values |= {f"local_loss/{index}": loss for index, loss in enumerate(record.local_loss)}
        values |= {f"grad_norm/{index}": norm for index, norm in enumerate(record.grad_norm)}
        values |= record.choices
        self._log(values, record.step)

    def evaluation(self, record: EvalRecord) -> None:
        """Log an evaluation."""
        named = {"eval_loss": record.held_out, "retention_loss": record.retention}
        found = {name: loss for name, loss in named.items() if loss is not None}
        self._log(found | {f"eval_{name}": value for name, value in record.choices.items()}, record.step)

    def finish(self) -> None:
        """Close the trackers."""
        for name, tracker in list((self.started or {}).items()):
            self._guarded(name, tracker.finish)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if self.started is None:
            self.started = {}
            for name, kind in self.classes.items():
                self._guarded(name, partial(self._start, name, kind))
        for name, tracker in list(self.started.items()):
            self._guarded(name, partial(tracker.log, dict(values), step=step))

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        """Do what a tracker is asked for; one that fails is told, and asked no more."""
        try:
            act()
        except Exception as error:  # of somebody else's code: the run is worth more
            self.warn(f"tracker {name} failed and hears no more: {type(error).__name__}: {error}")
            (self.started or {}).pop(name, None)

    def _start(self, name: str, kind: Any) -> None:
        in_folder = kind.requires_logging_directory  # OUTPUT/tensorboard
        tracker = kind(name, logging_dir=self.config.output) if in_folder else kind(PROJECT)
        tracker.start()
        given = {key: str(value) for key, value in self.config.model_dump(exclude_unset=True).items()}
        if not in_folder:  # TensorBoard would make a second run of the settings
            with suppress(Exception):  # a tracker that takes no settings has the numbers all the same
                tracker.store_init_configuration({**given, "output": Path(self.config.output).name})
        assert self.started is not None
        self.started[name] = tracker


def trackers_of(config: Config, warn: Callable[[str], None]) -> Trackers | None:
    """The trackers that the settings name; None where they name none. Raises InputError for one that cannot be used."""
    if config.track is None:
        return None
    try:
        from accelerate import PartialState  # type: ignore[import-untyped]
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("needs accelerate", where="track", fix="pip install 'lopt-edge[track]'") from None
    known, there = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}, set(map(str, get_available_trackers()))
    for name in config.track:
        if name not in known:
            raise InputError(f"{name!r} is unknown", where="track", fix=f"choose from {', '.join(sorted(known))}")
        if name not in there:
            raise InputError(f"{name} is not installed", where="track", fix=f"pip install {PACKAGES.get(name, name)}")
    PartialState(cpu=True)  # its logging asks which process this is
    return Trackers(config, {name: known[name] for name in config.track}, warn)
