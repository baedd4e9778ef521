"""Where a run begins: at a checkpoint if it is resumed, and whether this is still the same run.

What decides the arithmetic must be as it was: method, segments, LoRA's shape, optimizer, learning rates, seed, and by
fingerprints (not by path) the model and the data. What may change is listed in `MAY_CHANGE`: budgets and paging, which
change no bit (design law 3), logging, and the number of steps, which stretches the learning rates' schedule (not where it
would move a stage that is over). What the planner had settled (micro-batches, segments, tiles) stays settled. Differences
are reported all together.

The compute device may change too, and so may the number of threads and the versions of libraries: then the bits may
differ, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.config.settings import Config
from lopt_edge.data import Dataset
from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.methods import METHODS
from lopt_edge.system.versions import versions
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, MANIFEST, Checkpoint, latest, read
from lopt_edge.training.checkpoint.run_state import RunState

MAY_CHANGE = frozenset({
    "output", "resume", "save_every", "save_minutes", "keep", "on_nan", "max_skipped", "max_steps", "epochs",
    "eval_data", "eval_every", "retention_data", "sample_prompt", "system", "cache_dir", "init_adapter", "device",
    "weights", "activations", "saved_inputs", "optimizer_states", "gradients", "apply", "prefetch", "device_memory",
    "host_memory", "disk_memory", "pinned_memory", "page_dir", "memory_report", "force", "dry_run", "choose_micro_batch",
    "choose_segments", "boundary", "pipeline", "pipeline_minutes",
})  # fmt: skip
BY_FINGERPRINT = frozenset({
    "model", "revision", "data", "data_format", "chat_template", "max_seq_len", "eval_fraction", "compute_dtype",
    "teacher", "ignore_columns", "think", "escape_special_tokens",
})  # fmt: skip
SETTLED = ("batch_size", "grad_accum", "num_segments", "token_tile")


@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from, the state of its run, and the warnings that come with it."""

    checkpoint: Checkpoint
    state: RunState
    warnings: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """The checkpoint's state.json."""
        return self.checkpoint.state


def find_start(config: Config) -> tuple[Config, Start | None, list[str]]:
    """The settings with what was settled before, where to go on (None: at the beginning), and warnings.

    Raises InputError(s) for a checkpoint that is not whole, or of a run with other settings.
    """
    found, faults = _locate(config)
    if found is None:
        return config, None, [f"a checkpoint was left out: {fault}" for fault in faults]
    where = str(found.folder)
    state = RunState.from_dict(found.state.get("run"), where=where)
    before, settled = found.state.get("config"), found.state.get("settled")
    if not isinstance(before, dict) or not isinstance(settled, dict) or not {*SETTLED} <= set(settled):
        raise InputError("its settings are malformed", where=where, fix="use another checkpoint")
    differences = [
        InputError(f"was {before.get(name, _default(name))!r}, is {value!r} now", where=name)
        for name, value in config.model_dump(mode="json").items()
        if name not in _may_change(config) and _deciding(name, before.get(name, _default(name))) != _deciding(name, value)
    ]
    if differences:
        raise _another_run(found, differences)
    update = {**settled, "choose_micro_batch": False, "choose_segments": False}
    warnings = [f"a checkpoint was left out: {fault}" for fault in faults]
    return config.model_copy(update=update), Start(found, state), [*warnings, *_changed(config, before, found)]


def _may_change(config: Config) -> frozenset[str]:
    """The settings that a resumed run may change: without those that decide when a stage ends."""
    return (MAY_CHANGE | BY_FINGERPRINT) - METHODS[config.method].pinned(config)


def _default(name: str) -> Any:
    """The default of a setting that a checkpoint of an earlier version does not know."""
    return Config.model_fields[name].get_default()


def _deciding(name: str, value: Any) -> Any:
    """The part of a setting that decides the arithmetic: of a boundary cache whether there is one, not where."""
    return value is not None if name == "boundary_cache" else value


def _locate(config: Config) -> tuple[Checkpoint | None, list[str]]:
    if config.resume is None:
        return None, []
    if config.resume == "auto":
        return latest(Path(config.output) / CHECKPOINTS)
    folder = Path(config.resume).expanduser()
    if (folder / MANIFEST).exists():
        return read(folder), []
    for root in (folder / CHECKPOINTS, folder):
        found, faults = latest(root)
        if found is not None:
            return found, faults
        if faults:
            raise InputError("; ".join(faults), where="resume")
    raise InputError(
        f"no checkpoint in {folder}", where="resume", fix="name a run's output folder or one of its checkpoints"
    )


def _another_run(found: Checkpoint, differences: list[InputError]) -> InputErrors:
    head = InputError(
        f"{found.folder} is a checkpoint of another run: these settings must be as they were",
        where="resume",
        fix="put them back, or begin a new run in another folder",
    )
    return InputErrors([head, *differences])


def _changed(config: Config, before: dict[str, Any], found: Checkpoint) -> Iterator[str]:
    phases = " and the method's phases change" if METHODS[config.method].phases_follow_steps else " changes"
    for name in ("max_steps", "epochs"):
        if before.get(name) != getattr(config, name):
            was = f"{name} was {before.get(name)}, is {getattr(config, name)}"
            yield f"{was}: the learning rates' schedule{phases} with it"
    old, new = found.state.get("versions"), versions()
    if isinstance(old, dict):
        found_changes = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
        if found_changes:
            yield f"resumed with other versions ({', '.join(found_changes)}): bits may differ from an undisturbed run"


def check_same(
    start: Start, *, model: str, teacher: str, train: Dataset, device_type: str, dtype: str, threads: int
) -> list[str]:
    """Refuse a model, teacher, data or dtype other than the checkpoint's (InputErrors, all together).

    Returns warnings about another device or number of threads, with which bits may differ.
    """
    values, differences = start.values, list[InputError]()
    kept = values.get("data")
    data: dict[str, Any] = kept if isinstance(kept, dict) else {}
    if values.get("model") != model:
        differences.append(InputError("its weights or its config.json are others than before", where="model"))
    if values.get("teacher", "") != teacher:
        differences.append(InputError("its weights or its config.json are others than before", where="teacher"))
    if data.get("fingerprint") != train.fingerprint:
        what = (
            f"gave {data.get('examples')} examples before and {len(train.examples)} now, or others (the file, its "
            "form, the template, max_seq_len or the held-out share changed)"
        )
        differences.append(InputError(what, where="data"))
    if values.get("compute_dtype") != dtype:
        differences.append(
            InputError(
                f"was {values.get('compute_dtype')}, is {dtype} now",
                where="compute_dtype",
                fix=f"add --compute-dtype {values.get('compute_dtype')}",
            )
        )
    if differences:
        raise _another_run(start.checkpoint, differences)
    if values.get("device") != device_type:
        return [
            f"the run began on {values.get('device')} and goes on on {device_type}: bits differ from an undisturbed run"
        ]
    if kind_of(device_type).computes_on_cores and values.get("threads") != threads:
        return [
            f"the run began with {values.get('threads')} threads and goes on with {threads}: bits may differ from an "
            "undisturbed run (OMP_NUM_THREADS sets them)"
        ]
    return []
