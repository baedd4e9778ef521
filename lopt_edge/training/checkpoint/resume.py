"""Where a run begins: at a checkpoint if it is resumed, and whether this is still the same run.

What decides the arithmetic must be as it was: method, segments, LoRA's shape, optimizer, learning rates, seed, and by
fingerprints (not by path) the model and the data. What may change is listed in `MAY_CHANGE`: budgets and paging, which
change no bit (design law 3), logging, and the number of steps, which stretches the learning rates' schedule (not where it
would move a stage that is over). What the planner had settled (micro-batches, rows, segments, tiles) stays settled.
Differences are reported all together.

A checkpoint's sums show damage, not intent: whoever edits one can make them right. So its values are checked for what a run
can have written, before anything is computed with them.

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
    "choose_segments", "boundary", "overwrite", "patience", "track", "pipeline", "pipeline_minutes", "push_to_hub",
    "packing", "row_tokens", "ranks", "deterministic", "kernels",
})  # fmt: skip
BY_FINGERPRINT = frozenset({
    "model", "revision", "data", "data_format", "chat_template", "max_seq_len", "eval_fraction", "compute_dtype",
    "teacher", "ignore_columns", "columns", "tokenizer", "think", "escape_special_tokens",
})  # fmt: skip
SETTLED = ("batch_size", "grad_accum", "num_segments", "token_tile", "row_tokens")
MOST_SEGMENTS, MOST_TOKENS = 10_000, 2**31  # of any model; of a tile
MOST_SHOWN = 120  # letters of a value


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
    if not _has_sound_numbers(found.state):
        raise InputError("its state holds a number that no run wrote", where=where, fix="use another checkpoint")
    state = RunState.from_dict(found.state.get("run"), where=where)
    before, settled = found.state.get("config"), found.state.get("settled")
    if not isinstance(before, dict) or not isinstance(settled, dict):
        raise InputError("its settings are malformed", where=where, fix="use another checkpoint")
    settled = {"row_tokens": None, **settled}  # an earlier version packed nothing
    config, before = _of_its_time(config, before)
    differences = [
        InputError(f"was {_shown(before.get(name, _default(name)))}, is {value!r} now", where=name)
        for name, value in config.model_dump(mode="json").items()
        if name not in _may_change(config) and _deciding(name, before.get(name, _default(name))) != _deciding(name, value)
    ]
    if differences:
        raise _another_run(found, differences)
    _check_settled(settled, config, where)
    update = {**{name: settled[name] for name in SETTLED}, "choose_micro_batch": False, "choose_segments": False}
    update["packing"] = settled["row_tokens"] is not None
    warnings = [f"a checkpoint was left out: {fault}" for fault in faults]
    return config.model_copy(update=update), Start(found, state), [*warnings, *_changed(config, before, found)]


def _of_its_time(config: Config, before: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The settings as a checkpoint of an earlier version meant them: its aux heads had the local losses' rate, and its
    early segments trained on every step where nothing else was said."""
    if "lr_head" in before:
        return config, before
    rate = config.local_lr if config.lr_head is None else config.lr_head
    if before.get("local_every") == 1:
        before = {**before, "local_every": None}  # today's default; there was no boundary that closes, so it means the same
    return config.model_copy(update={"lr_head": rate}), {**before, "lr_head": rate}


def _has_sound_numbers(value: Any) -> bool:
    """Whether all numbers in a JSON value are finite and fit 64 bits; anybody can make the sums of a manifest right."""
    if isinstance(value, dict | list):
        return all(map(_has_sound_numbers, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) < 2**63


def _check_settled(settled: dict[str, Any], config: Config, where: str) -> None:
    """Refuse what no planner settles: its micro-batches hold the sequences of the settings' window. Raises InputError."""
    try:
        sound = all(type(settled[name]) is int and settled[name] > 0 for name in SETTLED if settled[name] is not None)
        n_sequences = settled["batch_size"] * settled["grad_accum"]
        sound = sound and n_sequences == config.batch_size * config.grad_accum and settled["num_segments"] <= MOST_SEGMENTS
        sound = sound and max(settled["token_tile"] or 0, settled["row_tokens"] or 0) <= MOST_TOKENS
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise InputError("what the planner had settled is malformed", where=where, fix="use another checkpoint")


def _shown(value: Any) -> str:
    """A value of a checkpoint as a message shows it."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


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
    row_tokens = found.state["settled"].get("row_tokens")
    asked = (config.packing is not None and config.packing != bool(row_tokens), config.row_tokens not in (None, row_tokens))
    if any(asked):
        rows = f"rows of {row_tokens} tokens" if row_tokens else "without rows"
        yield f"{'packing' if asked[0] else 'row_tokens'} has no effect: the run goes on as it began, {rows}"
    for name in ("max_steps", "epochs"):
        if before.get(name) != getattr(config, name):
            was = f"{name} was {_shown(before.get(name))}, is {getattr(config, name)}"
            yield f"{was}: the learning rates' schedule{phases} with it"
    old, new = found.state.get("versions"), versions()
    if isinstance(old, dict):
        found_changes = [f"{name} {_word(old.get(name))} -> {new[name]}" for name in new if old.get(name) != new[name]]
        if found_changes:
            yield f"resumed with other versions ({', '.join(found_changes)}): bits may differ from an undisturbed run"


def _word(value: Any) -> str:
    """A word of a checkpoint as a message shows it."""
    return value[:40] if isinstance(value, str) else _shown(value)


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
            f"gave {_shown(data.get('examples'))} examples before and {len(train.examples)} now, or others (the file, its "
            "form, the template, max_seq_len or the held-out share changed)"
        )
        differences.append(InputError(what, where="data"))
    if (was := values.get("compute_dtype")) != dtype:
        named = _word(was)
        differences.append(
            InputError(f"was {named}, is {dtype} now", where="compute_dtype", fix=f"add --compute-dtype {named}")
        )
    if differences:
        raise _another_run(start.checkpoint, differences)
    device, n_threads = values.get("device"), values.get("threads")
    if device != device_type:
        return [f"the run began on {_word(device)} and goes on on {device_type}: bits differ from an undisturbed run"]
    if kind_of(device_type).computes_on_cores and n_threads != threads:
        return [
            f"the run began with {_shown(n_threads)} threads and goes on with {threads}: bits may differ from an "
            "undisturbed run (OMP_NUM_THREADS sets them)"
        ]
    return []
