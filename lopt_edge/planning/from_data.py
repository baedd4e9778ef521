"""Joins a run's settings and data to the planner: its workload, its budgets, and this machine's profile.

The planner needs sizes only (plan/search/workload.py); this file finds them: the longest examples, the stored dtype of the
vocabulary, what the process takes with the model's code imported, and what is free. It chooses nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lopt_edge.config.settings import Config
from lopt_edge.data import Dataset
from lopt_edge.models.folder import ModelFolder, vocabulary_itemsize
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.costs.teacher_pass import Teacher
from lopt_edge.plan.facts.cards import find_card
from lopt_edge.plan.facts.profile import DeviceProfile, default_cpu_profile, load_profile, profile_of_card, profile_path
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.search.search import Search
from lopt_edge.plan.search.workload import Workload
from lopt_edge.planning.settings import against_facts, search_space
from lopt_edge.run.model.load import import_model_code
from lopt_edge.system.allocator import release_free_memory
from lopt_edge.system.memory import resident_bytes

SLOW_CARD = "RTX 3060"  # whose rates stand in for an unknown GPU's


def workload_of(
    config: Config,
    source: ModelFolder,
    course: Course,
    targets: tuple[str, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    datasets: tuple[Dataset, Dataset | None, Dataset | None],
    teacher: ModelFolder | None = None,
) -> Workload:
    """The run's largest possible accumulation window, and its largest evaluation batch."""
    train, *others = datasets
    evaluated = [largest_window(other, batch_size=config.batch_size, grad_accum=1)[0] for other in others if other]
    profile = machine_profile(device)
    if config.max_steps is not None:  # how often the run comes by an example
        n_sequences = config.max_steps * config.batch_size * config.grad_accum
        course = replace(course, epochs=n_sequences / len(train.examples))
    dropout = config.lora_dropout > 0
    return Workload(
        course,
        LayerShape(source.facts, dtype.itemsize, config.lora_r, targets, device.type, dropout=dropout),
        tuple(largest_window(train, batch_size=config.batch_size, grad_accum=config.grad_accum)),
        profile,
        library_bytes(source) if device.type == "cpu" else profile.context_bytes,
        vocabulary_itemsize(source),
        evaluation=max(evaluated, key=lambda batch: batch.n_rows, default=None),
        clip_scope=config.clip_scope if config.clip else "none",
        teacher=teacher and Teacher(teacher.facts, vocabulary_itemsize(teacher), dtype.itemsize, device.type),
    )


def largest_window(dataset: Dataset, *, batch_size: int, grad_accum: int) -> list[MicroBatchSize]:
    """The longest examples in micro-batches, longest first: no window of any order takes more."""
    examples = sorted(dataset.examples, key=lambda example: len(example.input_ids), reverse=True)
    found = []
    for start in range(0, min(len(examples), batch_size * grad_accum), batch_size):
        rows = examples[start : start + batch_size]
        lengths = [len(example.input_ids) for example in rows]
        supervised = max(example.n_supervised for example in examples) * len(rows)
        n_supervised = min(supervised, sum(lengths))
        found.append(MicroBatchSize(len(rows), max(lengths), n_supervised, padded=min(lengths) < max(lengths)))
    return found


def library_bytes(source: ModelFolder) -> int:
    """The process' resident set with the model's code imported, before any weight: what the tensors come on top of."""
    import_model_code(source.path)
    release_free_memory()
    return resident_bytes()


def machine_profile(device: torch.device) -> DeviceProfile:
    """As measured by `doctor --measure`, else the card's by its name, else a default."""
    if profile_path().exists() and (measured := load_profile(profile_path())).device_type == device.type:
        return measured
    if device.type == "cpu":
        return default_cpu_profile()
    name = torch.cuda.get_device_name(device)
    if card := find_card(name):
        return profile_of_card(card)
    known = find_card(SLOW_CARD)
    assert known is not None
    memory = torch.cuda.get_device_properties(device).total_memory
    return replace(profile_of_card(known), name=name, memory_bytes=memory, source=f"unknown: the rates of an {known.name}")


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
