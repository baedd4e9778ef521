"""What a run needs before its first step: the checks that cost nothing first, then data, model, adapters and plan.

Order: everything that can be refused without loading (config, output folder, the checkpoint to go on from, model facts, the
method's course, data, teacher, caches) comes before the first expensive act (quantising), so that a mistake is reported in
seconds. Nothing is written to the output folder here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch

from lopt_edge.adapters.base import tell_if_another
from lopt_edge.config.load import DATA, file_errors
from lopt_edge.config.rules import no_effect_warnings
from lopt_edge.config.settings import Config
from lopt_edge.data import READ_SETTINGS, DataFormat, Dataset, fingerprint_of, load_dataset, mismatched_part, split
from lopt_edge.data.sources import sources_of
from lopt_edge.data.stored import where_those_are
from lopt_edge.errors import DoesNotFit, InputError, raise_collected, together
from lopt_edge.models.folder import ModelFolder, check_weights, find_model, model_fingerprint, tensor_entries
from lopt_edge.models.four_bit import four_bit_path
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.objectives import objective_of
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import AUTO, TORCH
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.processes import parts_of
from lopt_edge.plan.search.processes import in_processes
from lopt_edge.plan.search.run_plan import RunPlan, described, make_run_plan, summary
from lopt_edge.plan.search.search import Candidate, Search
from lopt_edge.plan.search.workload import Workload
from lopt_edge.planning.budgets import planned_budget, stated_budget
from lopt_edge.planning.from_data import ground_of
from lopt_edge.planning.packing import chosen_packing, settled_on_data
from lopt_edge.planning.question import Ground, search_for
from lopt_edge.planning.settings import (
    against_facts,
    check_memory_settings,
    chosen_settings,
    deterministic_notes,
    memory_warnings,
    split_to_fit,
)
from lopt_edge.planning.unlisted import about_unlisted
from lopt_edge.run.device import choose_device, choose_dtype
from lopt_edge.run.kernels.choice import choose_kernels
from lopt_edge.run.model.lora import check_adapter_folder
from lopt_edge.run.model.replaced import check_plain_adapter
from lopt_edge.training.checkpoint.output_folder import check_output
from lopt_edge.training.checkpoint.resume import Start, check_same, find_start
from lopt_edge.training.prepare.boundary_cache import check_boundary_cache
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.reference import HELD_OUT, TRAIN
from lopt_edge.training.prepare.teacher import check_teacher, find_teacher
from lopt_edge.training.prepare.tiers import check_folders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_inputs(config: Config, *, say: Callable[[str], None] = warn) -> tuple[Inputs, Start | None]:
    """Check and read everything but the weights, and the checkpoint to go on from. Raises InputError(s).

    `say` hears at once of what takes long.
    """
    check_output(Path(config.output), resuming=config.resume is not None, overwrite=config.overwrite)
    given = config
    config, start, resumed = find_start(config)
    found = _read_files(config, say)
    if start is not None:
        resumed += check_same(
            start,
            model=found.fingerprint,
            teacher=found.teacher_model,
            train=found.train,
            device_type=found.device.type,
            dtype=found.dtype_name,
            threads=torch.get_num_threads(),
        )
    planned = _ask_planner(config, found, resumes=start is not None)
    inputs = _inputs(given, config, found, planned, resumed)
    _check_stages(inputs)
    _check_steps(inputs, start)
    check_boundary_cache(inputs)
    check_teacher(inputs)
    return replace(inputs, warnings=(*inputs.warnings, *_never_closes(inputs), *inputs.course.advice)), start


@dataclass(frozen=True, eq=False)
class _Files:
    """Device, model, data and teacher as they were found, and what the method takes of them."""

    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str
    kernels: str
    kernels_reason: str
    source: ModelFolder
    targets: tuple[str, ...]
    max_seq_len: int
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset | None
    retention: Dataset | None
    teacher: ModelFolder | None
    teacher_model: str
    mismatched: Mapping[str, Dataset]
    fingerprint: str
    notes: tuple[str, ...]  # about the files

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _read_files(config: Config, say: Callable[[str], None]) -> _Files:
    """Device, dtype, model, settings against its facts, adapter to begin from, data, teacher; refused in this order."""
    (device, device_reason), source = _device_and_model(config, say)
    (dtype, dtype_reason), (kernels, kernels_reason) = together(
        lambda: choose_dtype(config.compute_dtype, device), lambda: choose_kernels(config.kernels, device)
    )
    facts, notes = source.facts, list(about_unlisted(source.facts))
    _, (_, targets, max_seq_len) = together(
        lambda: check_memory_settings(config, facts, device_type=device.type), lambda: against_facts(config, facts)
    )
    check_weights(
        source, tensor_entries(source.path, source.facts)
    )  # a missing or truncated shard is reported before the data is read
    if config.init_adapter:
        check_adapter_folder(Path(config.init_adapter))
        check_plain_adapter(Path(config.init_adapter))
        tell_if_another(source, Path(config.init_adapter), notes.append)
    tokenizer = load_tokenizer(source.path, say=notes.append)
    train, held_out, retention = read_datasets(config, tokenizer, vocab_size=facts.vocab_size, max_seq_len=max_seq_len)
    teacher = find_teacher(config, tokenizer)
    teacher_model = model_fingerprint(teacher) if teacher is not None else ""
    return _Files(
        device, device_reason, dtype, dtype_reason, kernels, kernels_reason, source, targets, max_seq_len,
        tokenizer, train, held_out, retention, teacher, teacher_model, mismatched_of(config, train, held_out),
        model_fingerprint(source), tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Answer:
    """The planner's answer: the settings with what it settled, and the plan of the largest step."""

    config: Config
    order: tuple[int, int]  # batch_size and grad_accum of the windows
    stated: Budget
    ground: Ground
    workload: Workload
    run_plan: RunPlan
    knobs: Knobs
    disk_bytes: int  # of page files
    pipeline_reasons: tuple[str, ...]
    warnings: tuple[str, ...]  # of budgets that were lowered, and of micro-batches of a resumed run that had to be split


def _lacks_copy(model: ModelFolder | None, config: Config) -> bool:
    """Whether a model is in full precision, and its 4-bit copy has yet to be made."""
    return model is not None and not (four_bit_path(model, cache_dir=config.cache_dir) / "config.json").exists()


def _ask_planner(config: Config, found: _Files, *, resumes: bool) -> _Answer:
    """Budgets, what the planner settles of the settings, and the plan. Raises DoesNotFit, unless forced."""
    device, source = found.device, found.source
    stated, lowered = stated_budget(config, device)
    budget, reason = planned_budget(stated, device, ranks=config.ranks)
    reason = f"{reason}, lowered to what there is" if lowered else reason
    datasets = (found.train, found.held_out, found.retention, *found.mismatched.values())
    packs = config.optimizer == "adamw8bit" or any(_lacks_copy(model, config) for model in (source, found.teacher))
    ground = ground_of(
        source,
        device=device,
        dtype=found.dtype,
        datasets=datasets,
        teacher=found.teacher,
        packs=packs,
        kernels=found.kernels,
    )
    ground = replace(ground, pinned_bytes=budget.pinned_bytes)

    def ask(variant: Config) -> tuple[tuple[Config, Search], Candidate | None]:
        search = search_for(variant, ground)
        return (variant, search), search.within(budget).best

    order, split = (config.batch_size, config.grad_accum), ""
    if resumes:  # what was settled stays; micro-batches are split only if nothing fits otherwise
        (config, search), split = split_to_fit(config, ask)
    else:
        answer = settled_on_data(config, source.facts, found.train, ask=ask, parts=lambda pair: pair, budget=budget)
        config, search = answer
        order = config.batch_size, config.grad_accum
    workload = search.workload
    run_plan, knobs, disk_bytes = _planned(config, search, budget, reason)
    pipeline_reasons: tuple[str, ...] = ()
    parts = parts_of(workload.course.kinds[0].segments, config.pipeline) if config.pipeline > 1 else ()
    if parts:
        run_plan, pipeline_reasons = in_processes(run_plan, workload, knobs, parts)
        workload = replace(workload, part=parts[0])
    warnings = (*lowered, *([split] if split else []))
    return _Answer(config, order, stated, ground, workload, run_plan, knobs, disk_bytes, pipeline_reasons, warnings)


def _inputs(given: Config, asked: Config, found: _Files, planned: _Answer, resumed: list[str]) -> Inputs:
    """The record, once the folders of its tiers are sound. `given`: as the user wrote it; `asked`: with what a checkpoint
    had settled; `resumed`: warnings about that checkpoint."""
    config, source, knobs = planned.config, found.source, planned.knobs
    folder_warnings = check_folders(config, source, knobs, planned.stated, need_disk_bytes=planned.disk_bytes)
    warnings = (
        *resumed,
        *found.notes,
        *planned.warnings,
        *_warnings(given, source, found.train, max_seq_len=found.max_seq_len),  # settled settings were not stated
        *memory_warnings(config, knobs, source.facts),
        *folder_warnings,
    )
    return Inputs(
        config,
        source,
        found.tokenizer,
        found.train.template,
        found.train,
        found.held_out,
        found.retention,
        planned.workload.course,
        found.targets,
        found.device,
        found.dtype,
        knobs,
        planned.stated,
        planned.ground,
        planned.workload,
        planned.run_plan,
        tuple(_reasons(asked, found, planned)),
        warnings,
        given,
        planned.order,
        found.fingerprint,
        found.teacher,
        found.teacher_model,
        found.mismatched,
    )


def _reasons(asked: Config, found: _Files, planned: _Answer) -> Iterator[str]:
    """A sentence about each thing that was decided."""
    source, train, run_plan, course = found.source, found.train, planned.run_plan, planned.workload.course
    facts = source.facts
    yield f"model {source.name}: {facts.architecture}, {facts.n_layers} layers, hidden {facts.hidden_size}"
    yield f"device {found.device} ({found.device_reason}), compute dtype {found.dtype_name} ({found.dtype_reason})"
    yield (
        f"data {planned.config.data}: {len(train.examples)} examples, {train.n_tokens:,} tokens, "
        f"{train.n_supervised:,} supervised; format {train.format} ({train.reason}); template: {train.template_reason}"
    )
    yield from (f"method {course.method}, {_described_kind(kind)}" for kind in course.kinds)
    if (objective := objective_of(planned.config)) is not None:
        values = ", ".join(f"{name} {value:g}" for name, value in objective.settings.items())
        yield f"objective {objective.name}: {values}, peak learning rate {planned.config.lr:g}"
    yield f"memory: {described(run_plan.knobs)} (the best of {run_plan.n_combinations}; budget: {run_plan.notes[0]})"
    if found.kernels != TORCH or asked.kernels != AUTO:
        yield f"kernels {found.kernels} ({found.kernels_reason})"
    yield from deterministic_notes(asked, found.device.type)
    yield from planned.pipeline_reasons
    if planned.config.ranks > 1:
        yield (
            f"{planned.config.ranks} ranks share each step; budgets, plan and predictions are one rank's, and each has "
            "page files of its own"
        )
    yield from chosen_settings(asked, planned.config)
    yield from chosen_packing(asked, planned.config)
    yield from (f"predicted for the largest step: {line}" for line in summary(run_plan))


def _check_steps(inputs: Inputs, start: Start | None) -> None:
    """Refuse a checkpoint that lies behind the run's end: nothing would be trained, and that looks like a result."""
    if start is not None and start.state.steps > inputs.n_steps:
        raise InputError(
            f"the checkpoint is after step {start.state.steps}, the run has {inputs.n_steps} steps",
            where="resume",
            fix="raise --max-steps or --epochs, or name an earlier checkpoint",
        )


def _check_stages(inputs: Inputs) -> None:
    """Refuse fewer steps than stages (InputError)."""
    course = inputs.course
    if course.restarts and inputs.n_steps < len(course.phases):
        raise InputError(
            f"{len(course.phases)} stages need as many steps, the run has {inputs.n_steps}",
            where="stages",
            fix="lower --stages, or raise --max-steps or --epochs",
        )


def _never_closes(inputs: Inputs) -> Iterator[str]:
    """A sentence where the run is too short for its last phase: the boundary would never be where it was asked to be."""
    course, n_steps = inputs.course, inputs.n_steps
    if course.settles and course.phase(n_steps, n_steps)[0] < len(course.phases) - 1:
        yield f"the last depth of the schedule is never reached: the run has {n_steps} steps"


def _device_and_model(config: Config, say: Callable[[str], None]) -> tuple[tuple[torch.device, str], ModelFolder]:
    """(device and reason, model), with what else is wrong in files; a hub's model is fetched only if nothing is."""
    cheap = (lambda: choose_device(config.device), lambda: _check_files(config))

    def find() -> ModelFolder:
        return find_model(config.model, revision=config.revision, tokenizer=config.tokenizer, say=say)

    if Path(config.model).expanduser().exists() or config.model.count("/") != 1:
        device, _, source = together(*cheap, find)
        return device, source
    device, _ = together(*cheap)
    return device, find()


def _check_files(config: Config) -> None:
    together(
        *(partial(sources_of, value, where=name) for name in DATA if (value := getattr(config, name)) is not None),
        lambda: raise_collected(file_errors({"chat_template": config.chat_template})),
    )


def _described_kind(kind: StepKind) -> str:
    """A kind of step in a line."""
    segments = ", ".join(segment.text().split(" layers=")[1].replace("loss=", "") for segment in kind.segments)
    fresh = ", each updated before the next one runs" if kind.fresh else ""
    return f"segments{f' of {kind.name} steps' if kind.name else ''}: {segments}{fresh}"


def _planned(config: Config, search: Search, budget: Budget, reason: str) -> tuple[RunPlan, Knobs, int]:
    """The answer of the planner, its knobs, and the bytes of page files. Raises DoesNotFit, unless forced."""
    found = make_run_plan(search, budget, notes=(reason,), brief=True)
    if not found.fits and not config.force:
        would_fit = "".join(f"{change}, or " for change in found.would_fit)
        raise DoesNotFit(
            "; ".join(("nothing fits the memory budgets", *found.missing)),
            where="device_memory",
            fix=f"{would_fit}--force, which starts in spite of it",
        )
    assert found.chosen is not None
    chosen = found.chosen
    # without the timeline, which would take memory through the run
    return replace(found, chosen=None), chosen.knobs, chosen.prediction.disk_bytes


def _warnings(config: Config, source: ModelFolder, train: Dataset, *, max_seq_len: int) -> Iterator[str]:
    yield from no_effect_warnings(config)
    if config.revision and source.commit is None:
        yield "revision has no effect: the model is a local folder"
    if max_seq_len < config.max_seq_len:
        yield f"sequences are cut at {max_seq_len} tokens: the model has no more positions"
    lost = {
        "cut at max_seq_len": train.n_truncated,
        "dropped (no token to learn)": train.n_dropped,
    }
    yield from (
        f"{count} of {train.n_rows} rows are {what}; see lopt-edge data check" for what, count in lost.items() if count
    )
    yield from (f"{note.text()}; see lopt-edge data check" for note in train.notes)
    if train.missing_columns:
        yield f"ignore_columns: no row has {', '.join(train.missing_columns)}"


def read_datasets(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, max_seq_len: int
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """What trains, what is held out, and what measures forgetting. Raises InputError."""
    settings: dict[str, Any] = {name: getattr(config, name) for name in READ_SETTINGS}

    def read(path: str, data_format: DataFormat | None = None, **others: Any) -> Dataset:
        return load_dataset(
            path,
            tokenizer,
            max_seq_len=max_seq_len,
            data_format=data_format,
            chat_template=config.chat_template,
            **{**settings, **others},
        )

    objective = objective_of(config)
    read_chosen = partial(read, data_format=config.data_format, preferences="none" if objective is None else objective.form)
    train = read_chosen(config.data)
    held_out = retention = None
    if config.eval_data:
        held_out = read_chosen(config.eval_data)
    elif config.eval_fraction:
        train, held_out = split(train, fraction=config.eval_fraction, seed=config.seed)
    if config.retention_data:
        retention = _end_not_scored(
            read(config.retention_data, columns=None), tokenizer.eos_token_id, path=config.retention_data
        )
    for dataset in (train, held_out, retention):
        largest = dataset.largest_id if dataset else 0
        if largest >= vocab_size:
            raise InputError(
                f"the tokenizer gives id {largest}, the model has {vocab_size} rows",
                where="model",
                fix="use the tokenizer that belongs to the model",
            )
    return train, held_out, retention


def mismatched_of(config: Config, train: Dataset, held_out: Dataset | None) -> dict[str, Dataset]:
    """The mismatched replies that an objective compares with, by the name of the data set whose prompts they have."""
    objective = objective_of(config)
    if objective is None or not objective.compares:
        return {}
    return {TRAIN: mismatched_part(train)} | ({} if held_out is None else {HELD_OUT: mismatched_part(held_out)})


def _end_not_scored(dataset: Dataset, end_id: int | None, *, path: str) -> Dataset:
    """Plain texts without the end token behind them as a target. Raises InputError if nothing is left.

    It is not of the text: that texts end is what training on replies teaches, so retention would seem to improve.
    """
    if dataset.format != "text":
        return dataset
    found = (
        replace(example, supervised=example.supervised[:-1] + b"\0")
        if (after is None or after.where != example.where) and example.input_ids[-1] == end_id  # a row's windows in order
        else example
        for example, after in pairwise(chain(dataset.examples, [None]))
        if example is not None
    )
    examples = where_those_are(dataset.examples, (example for example in found if example.n_supervised))
    if not examples:
        raise InputError("no text has two tokens: there is nothing to score", where=path, fix="give longer texts")
    return replace(dataset, examples=examples, fingerprint=fingerprint_of(examples))
