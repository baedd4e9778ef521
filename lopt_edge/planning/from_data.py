"""What the planner's question stands on where there is data: its longest examples, this machine's profile, its libraries.

The planner needs sizes only (plan/search/workload.py); this file finds them: the longest examples, the stored dtype of the
vocabulary, what the process takes with the model's code imported, and what is free. It chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from heapq import nlargest

import torch

from lopt_edge.config.settings import Config
from lopt_edge.data import Dataset, members, unit_lengths
from lopt_edge.models.folder import ModelFolder, vocabulary_itemsize
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.costs.teacher_pass import Teacher
from lopt_edge.plan.facts.cards import find_card
from lopt_edge.plan.facts.device_kinds import TORCH, kind_of
from lopt_edge.plan.facts.profile import DeviceProfile, default_cpu_profile, load_profile, profile_of_card, profile_path
from lopt_edge.planning.packing import largest_rows
from lopt_edge.planning.question import Ground, LargestStep
from lopt_edge.run.device import device_of
from lopt_edge.run.model.classes import import_model_code
from lopt_edge.system.allocator import release_free_memory
from lopt_edge.system.memory import resident_bytes
from quant.nf4 import import_packing

SLOW_CARD = "RTX 3060"  # whose rates stand in for an unknown GPU's


def ground_of(
    source: ModelFolder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    datasets: Sequence[Dataset | None],
    teacher: ModelFolder | None = None,
    packs: bool = False,
    kernels: str = TORCH,
) -> Ground:
    """The ground of a run's model and data on this machine. `datasets`: what trains first, then what is evaluated.

    `packs`: this process will pack a model into 4 bits, or moments into 8.
    """
    if packs:
        import_packing()
    profile, itemsize = machine_profile(device), dtype.itemsize
    return Ground(
        source.facts,
        itemsize,
        profile,
        library_bytes(source) if kind_of(device.type).counts_process else profile.context_bytes,
        vocabulary_itemsize(source),
        partial(largest_step, datasets),
        None if teacher is None else Teacher(teacher.facts, vocabulary_itemsize(teacher), itemsize, device.type),
        kernels=kernels,
    )


def largest_step(datasets: Sequence[Dataset | None], config: Config) -> LargestStep:
    """The run's largest possible accumulation window, and its largest evaluation batch."""
    train, *others = datasets
    assert train is not None
    n_sequences = config.batch_size * config.grad_accum
    if config.packing:
        row_tokens = config.row_tokens or config.max_seq_len
        evaluated = [largest_rows(other, row_tokens=row_tokens)[0] for other in others if other]
        largest = largest_rows(train, row_tokens=row_tokens, n_sequences=n_sequences)
    else:
        evaluated = [largest_window(other, batch_size=config.batch_size, grad_accum=1)[0] for other in others if other]
        largest = largest_window(train, batch_size=config.batch_size, grad_accum=config.grad_accum)
    epochs = config.max_steps * n_sequences / train.n_units if config.max_steps is not None else None
    return LargestStep(tuple(largest), max(evaluated, key=lambda batch: batch.n_rows, default=None), epochs)


def largest_window(dataset: Dataset, *, batch_size: int, grad_accum: int) -> list[MicroBatchSize]:
    """The longest examples (or pairs) in micro-batches, longest first: no window of any order takes more."""
    lengths = unit_lengths(dataset.lengths, dataset.together)
    units = nlargest(batch_size * grad_accum, range(len(lengths)), key=lengths.__getitem__)
    most, scored = max(dataset.target_counts), dataset.together if dataset.labels else 0
    found = []
    for start in range(0, min(len(units), batch_size * grad_accum), batch_size):
        rows = [dataset.lengths[index] for index in members(units[start : start + batch_size], dataset.together)]
        n_supervised = min(most * len(rows), sum(rows))
        found.append(MicroBatchSize(len(rows), max(rows), n_supervised, padded=min(rows) < max(rows), scored=scored))
    return found


def library_bytes(source: ModelFolder) -> int:
    """The process' resident set with the model's code imported, before any weight: what the tensors come on top of."""
    import_model_code(source.path)
    release_free_memory()
    return resident_bytes()


def machine_profile(device: torch.device) -> DeviceProfile:
    """The device's profile as measured by `doctor --measure`, else the card's by its name, else a default."""
    if profile_path().exists() and (measured := load_profile(profile_path())).device_type == device.type:
        return measured
    own = device_of(device)
    if own.kind.computes_on_cores:
        return default_cpu_profile()
    name = own.name()
    if card := find_card(name):
        return profile_of_card(card)
    known = find_card(SLOW_CARD)
    assert known is not None
    source = f"unknown: the rates of an {known.name}"
    return replace(profile_of_card(known), name=name, memory_bytes=own.total_bytes(), source=source)
