"""What a run needs before its first step: the checks that cost nothing first, then data, model, adapters and plan.

Order: everything that can be refused without loading (config, output folder, the checkpoint to go on from, model facts, the
method's course, data, teacher, caches) comes before the first expensive act (quantising), so that a mistake is told in
seconds. Nothing is written to the output folder here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lopt_edge.artifacts import AdapterShape, check_output
from lopt_edge.caching import check_boundary_cache
from lopt_edge.config import Config, file_errors, no_effect_warnings
from lopt_edge.data import ChatTemplate, Dataset, Window, collate, epoch_windows, load_dataset, split, split_window
from lopt_edge.errors import DoesNotFit, InputError, raise_collected, together
from lopt_edge.generation import load_tokenizer
from lopt_edge.memory import check_folders, stated_budget
from lopt_edge.models import ModelFolder, check_weights, find_model, tensor_entries
from lopt_edge.plan.budget import Budget
from lopt_edge.plan.choose import (
    against_facts,
    check_memory_settings,
    chosen_settings,
    memory_warnings,
    search_space,
    settled,
    split_to_fit,
)
from lopt_edge.plan.course import Course
from lopt_edge.plan.knobs import Knobs
from lopt_edge.plan.ops import Plan
from lopt_edge.plan.pipeline import Part, own_knobs, parts_of
from lopt_edge.plan.predict import Prediction
from lopt_edge.plan.processes import in_processes
from lopt_edge.plan.run_plan import RunPlan, described, make_run_plan, summary
from lopt_edge.plan.search import Candidate, Search
from lopt_edge.plan.sizes import MicroBatchSize
from lopt_edge.plan.step import StepKind
from lopt_edge.plan.workload import Workload
from lopt_edge.prediction import planned_budget, workload_of
from lopt_edge.resuming import Start, check_same, find_start, model_fingerprint
from lopt_edge.run.averages import Averages
from lopt_edge.run.batches import Batch, make_batch
from lopt_edge.run.device import choose_device, choose_dtype
from lopt_edge.run.executor import Executor
from lopt_edge.run.load import Model
from lopt_edge.run.lora import attach_adapters, check_adapter_folder, load_adapters
from lopt_edge.run.losses import ReconstructHead
from lopt_edge.run.optim import SegmentOptimizer
from lopt_edge.run.replaced import check_plain_adapter, group_parameters
from lopt_edge.teaching import check_teacher, find_teacher
from quant.linear import DropoutClock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that was read and decided before the weights are touched."""

    config: Config
    source: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    train: Dataset
    held_out: Dataset | None
    retention: Dataset | None
    course: Course
    targets: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    knobs: Knobs
    budget: Budget
    workload: Workload
    run_plan: RunPlan
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    asked: Config | None = None  # the settings as given: `config` has what was settled
    order: tuple[int, int] = (1, 1)  # batch_size and grad_accum of the windows; `config` may split their micro-batches
    model: str = ""  # fingerprint
    teacher: ModelFolder | None = None  # where it is another model than the base
    teacher_model: str = ""  # its fingerprint

    @property
    def n_steps(self) -> int:
        per_epoch = ceil(len(self.train.examples) / prod(self.order))
        return self.config.max_steps or self.config.epochs * per_epoch

    def windows(self, *, first: int) -> Iterator[Window]:
        """Accumulation windows, epoch after epoch, without end; `first` counts from 0."""
        batch_size, grad_accum = self.order
        per_epoch = ceil(len(self.train.examples) / (batch_size * grad_accum))
        for epoch in count(first // per_epoch):
            found = epoch_windows(self.train.lengths, seed=self.config.seed, epoch=epoch, batch_size=batch_size,
                                  grad_accum=grad_accum)  # fmt: skip
            skipped = first % per_epoch if epoch == first // per_epoch else 0
            yield from (split_window(window, self.config.batch_size) for window in found[skipped:])

    @property
    def part(self) -> Part | None:
        """What this process runs of a pipeline: process 0, the others have no Inputs (follower.py)."""
        return self.workload.part

    @property
    def own_knobs(self) -> Knobs:
        """With other processes' layers elsewhere."""
        return self.knobs if self.part is None else own_knobs(self.knobs, self.part)

    def plan(self, n_micro_batches: int, kind: StepKind | None = None) -> Plan:
        """The validated plan of a step over this many micro-batches (the last window of an epoch may be short).

        Of the first kind of step, unless another is named.
        """
        return self.workload.plan(self.knobs, n_micro_batches=n_micro_batches, kind=kind)

    def predict(self, batches: Sequence[MicroBatchSize] | None = None, kind: StepKind | None = None) -> Prediction:
        """What a step takes: the largest one of the run, or one over these micro-batches."""
        if batches is None:
            return self.workload.predict(self.knobs)
        return replace(self.workload, batches=tuple(batches)).predict(self.knobs, whole=True, kind=kind)

    def batches(self, dataset: Dataset) -> list[Batch]:
        """The whole dataset in micro-batches of similar lengths, for evaluation."""
        order = sorted(range(len(dataset.examples)), key=dataset.lengths.__getitem__)
        size = self.config.batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        return [self.batch(dataset, group) for group in groups]

    def batch(self, dataset: Dataset, indices: list[int] | tuple[int, ...]) -> Batch:
        # Padding is neither attended to nor supervised, so any id does; a tokenizer's own may lie beyond the embedding.
        return make_batch(collate([dataset.examples[i] for i in indices], pad_id=0), self.device, examples=indices)


def read_inputs(config: Config) -> tuple[Inputs, Start | None]:
    """Check and read everything but the weights, and the checkpoint to go on from. Raises InputError(s)."""
    check_output(Path(config.output), resuming=config.resume is not None)
    given = config
    config, start, resumed = find_start(config)
    (device, device_reason), source = _device_and_model(config)
    dtype, dtype_reason = choose_dtype(config.compute_dtype, device)
    facts = source.facts
    _, (course, targets, max_seq_len) = together(
        lambda: check_memory_settings(config, facts, device_type=device.type), lambda: against_facts(config, facts)
    )
    check_weights(source, tensor_entries(source.path))  # a missing or truncated shard is told before the data is read
    if config.init_adapter:
        check_adapter_folder(Path(config.init_adapter))
        check_plain_adapter(Path(config.init_adapter))
    tokenizer = load_tokenizer(source.path)
    train, held_out, retention = _datasets(config, tokenizer, vocab_size=facts.vocab_size, max_seq_len=max_seq_len)
    teacher = find_teacher(config, tokenizer)
    teacher_model = model_fingerprint(teacher) if teacher is not None else ""
    fingerprint, dtype_name = model_fingerprint(source), str(dtype).removeprefix("torch.")
    if start is not None:
        resumed += check_same(start, model=fingerprint, teacher=teacher_model, train=train, device_type=device.type,
                              dtype=dtype_name, threads=torch.get_num_threads())  # fmt: skip
    stated = stated_budget(config, device)
    budget, reason = planned_budget(stated, device)
    datasets = (train, held_out, retention)

    def ask(variant: Config) -> tuple[tuple[Config, Search], Candidate | None]:
        search = search_for(variant, source, device=device, dtype=dtype, datasets=datasets, teacher=teacher)
        return (variant, search), search.within(budget).best

    asked = config
    if start is None:
        config, search = settled(config, facts, ask)
        order = config.batch_size, config.grad_accum
    else:  # what was settled stays; micro-batches are split only if nothing fits otherwise
        (config, search), split = split_to_fit(config, ask)
        order = asked.batch_size, asked.grad_accum
        resumed += [split] if split else []
    workload, course = search.workload, search.workload.course
    run_plan, knobs, disk_bytes = _planned(config, search, budget, reason)
    pipeline_reasons: tuple[str, ...] = ()
    parts = parts_of(course.kinds[0].segments, config.pipeline) if config.pipeline > 1 else ()
    if parts:
        run_plan, pipeline_reasons = in_processes(run_plan, workload, knobs, parts)
        workload = replace(workload, part=parts[0])
    folder_warnings = check_folders(config, source, knobs, stated, need_disk_bytes=disk_bytes)
    reasons = (
        f"model {source.name}: {facts.architecture}, {facts.n_layers} layers, hidden {facts.hidden_size}",
        f"device {device} ({device_reason}), compute dtype {dtype_name} ({dtype_reason})",
        f"data {config.data}: {len(train.examples)} examples, {train.n_tokens:,} tokens, {train.n_supervised:,} supervised"
        f"; format {train.format} ({train.reason}); template: {train.template_reason}",
        *(f"method {course.method}, {_described_kind(kind)}" for kind in course.kinds),
        f"memory: {described(run_plan.knobs)} (the best of {run_plan.n_combinations}; budget: {run_plan.notes[0]})",
        *pipeline_reasons,
        *chosen_settings(asked, config),
        *(f"predicted for the largest step: {line}" for line in summary(run_plan)),
    )
    warnings = tuple(_warnings(given, source, train, max_seq_len=max_seq_len))  # settled ones were not said
    inputs = Inputs(
        config, source, tokenizer, train.template, train, held_out, retention, course, targets, device, dtype, knobs,
        stated, workload, run_plan, reasons, (*resumed, *warnings, *memory_warnings(config, knobs), *folder_warnings),
        given, order, fingerprint, teacher, teacher_model,
    )  # fmt: skip
    if course.restarts and inputs.n_steps < len(course.phases):
        raise InputError(f"{len(course.phases)} stages need as many steps, the run has {inputs.n_steps}", where="stages",
                         fix="lower --stages, or raise --max-steps or --epochs")  # fmt: skip
    check_boundary_cache(inputs)
    check_teacher(inputs)
    return inputs, start


def _device_and_model(config: Config) -> list[Any]:
    """(device and reason, model), with what else is wrong in files; a hub's model is fetched only if nothing is."""
    cheap = (lambda: choose_device(config.device), lambda: _check_files(config))

    def find() -> ModelFolder:
        return find_model(config.model, revision=config.revision)

    if Path(config.model).expanduser().exists() or config.model.count("/") != 1:
        device, _, source = together(*cheap, find)
        return [device, source]
    device, _ = together(*cheap)
    return [device, find()]


def _check_files(config: Config) -> None:
    names = ("data", "eval_data", "retention_data", "chat_template")
    raise_collected(file_errors({name: getattr(config, name) for name in names}))


def _described_kind(kind: StepKind) -> str:
    """A kind of step in a line."""
    segments = ", ".join(segment.text().split(" layers=")[1].replace("loss=", "") for segment in kind.segments)
    fresh = ", each updated before the next one runs" if kind.fresh else ""
    return f"segments{f' of {kind.name} steps' if kind.name else ''}: {segments}{fresh}"


def search_for(
    config: Config,
    source: ModelFolder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    datasets: tuple[Dataset, Dataset | None, Dataset | None],
    teacher: ModelFolder | None = None,
) -> Search:
    """The planner's search for a run with these settings, models and data."""
    course, targets, _ = against_facts(config, source.facts)
    workload = workload_of(config, source, course, targets, device=device, dtype=dtype, datasets=datasets, teacher=teacher)
    return Search(workload, search_space(config, source.facts, device.type))


def _planned(config: Config, search: Search, budget: Budget, reason: str) -> tuple[RunPlan, Knobs, int]:
    """The answer of the planner, its knobs, and the bytes of page files. Raises DoesNotFit, unless forced."""
    found = make_run_plan(search, budget, notes=(reason,), brief=True)
    if not found.fits and not config.force:
        would_fit = "".join(f"{change}, or " for change in found.would_fit)
        raise DoesNotFit("; ".join(("nothing fits the memory budgets", *found.missing)), where="device_memory",
                         fix=f"{would_fit}--force, which starts in spite of it")  # fmt: skip
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
    lost = {"cut at max_seq_len": train.n_truncated, "dropped (no token to learn)": train.n_dropped,
            "learned in their last turn only (the template rewrites earlier ones)": train.n_last_turn_only}  # fmt: skip
    yield from (
        f"{count} of {train.n_rows} rows are {what}; see lopt-edge data check" for what, count in lost.items() if count
    )


def _datasets(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, max_seq_len: int
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    options = {"max_seq_len": max_seq_len, "chat_template": config.chat_template}
    train = load_dataset(config.data, tokenizer, data_format=config.data_format, **options)
    held_out = retention = None
    if config.eval_data:
        held_out = load_dataset(config.eval_data, tokenizer, data_format=config.data_format, **options)
    elif config.eval_fraction:
        train, held_out = split(train, fraction=config.eval_fraction, seed=config.seed)
    if config.retention_data:
        retention = load_dataset(config.retention_data, tokenizer, **options)
    for dataset in (train, held_out, retention):
        largest = max((max(example.input_ids) for example in dataset.examples), default=0) if dataset else 0
        if largest >= vocab_size:
            raise InputError(f"the tokenizer gives id {largest}, the model has {vocab_size} rows", where="model",
                             fix="use the tokenizer that belongs to the model")  # fmt: skip
    return train, held_out, retention


class Makings(Protocol):
    """What an executor is made from: a run's Inputs, or what process 0 tells another one (follower.py)."""

    config: Config
    source: ModelFolder
    course: Course
    targets: tuple[str, ...]
    device: torch.device

    @property
    def part(self) -> Part | None: ...


def build_executor(inputs: Makings, model: Model, *, adapter: str | None = None) -> tuple[Executor, AdapterShape]:
    """Adapters on every training layer, those of the folder `adapter` among them, aux heads, optimizer, executor.

    In a pipeline those of this process' layers and segments.
    """
    config, facts = inputs.config, inputs.source.facts
    model.clock.seed = config.seed  # of the dropout masks
    trained = inputs.course.adapted
    carried: list[int] = []
    if adapter is not None:
        carried = load_adapters(model, Path(adapter))
        setting = "init_adapter" if adapter == config.init_adapter else "adapter"
        _check_same_shape(inputs, model, [i for i in carried if i in model.here], where=f"{setting} {adapter}")
    fresh = [layer for layer in trained if layer not in carried and layer in model.here]
    own = [group for group in inputs.course.groups if inputs.part is None or inputs.part.owns(group)]
    attach_adapters(
        model, fresh, targets=inputs.targets, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout,
        seed=config.seed,
    )  # fmt: skip
    heads = {
        index: ReconstructHead(facts.hidden_size, seed=DropoutClock(config.seed, step=-2).key(index, 0)).to(inputs.device)
        for unit, index in own
        if unit == "aux"
    }
    parameters = {
        (unit, target): group_parameters(model, target) if unit == "layer" else list(heads[target].parameters())
        for unit, target in own
    }
    optimizer = SegmentOptimizer(
        parameters, mover=model.mover, weight_decay=config.weight_decay, clip=config.clip,
        clip_scope=config.clip_scope, optimizer=config.optimizer,
    )  # fmt: skip
    averages = Averages(model, inputs.course.averaged, momentum=config.ema_momentum) if inputs.course.averaged else None
    executor = Executor(model, heads=heads, optimizer=optimizer, local_weight=config.local_weight, averages=averages,
                        cascade_weight=config.cascade_weight)  # fmt: skip
    layers = tuple(sorted({*trained, *carried}))
    shape = AdapterShape(config.lora_r, config.lora_alpha, config.lora_dropout, inputs.targets, layers, facts.n_layers,
                         inputs.source.name, inputs.source.commit)  # fmt: skip
    return executor, shape


def _check_same_shape(inputs: Makings, model: Model, layers: list[int], *, where: str) -> None:
    """An adapter to start from must have the shape that the settings say: one adapter_config.json describes both."""
    config = inputs.config
    for layer in layers:
        for linear in inputs.source.facts.linears:
            module = model.layers[layer].get_submodule(linear.name)
            wanted = linear.short_name in inputs.targets
            found = module.lora_a is not None
            if wanted != found or (found and (module.lora_a.shape[1], module.scale) !=
                                   (config.lora_r, config.lora_alpha / config.lora_r)):  # fmt: skip
                raise InputError(
                    "its rank, alpha or target modules differ from lora_r, lora_alpha, lora_targets",
                    where=where,
                    fix="set these three to the values of its adapter_config.json",
                )
            if found:
                module.dropout_rate = config.lora_dropout
