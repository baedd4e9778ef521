"""`plan_run`: says before a run what it will take, and picks the fastest plan that fits. Never imports torch.

A model is a preset's name, a local folder, or a hub id (its config and the headers of its weights only). The step is the
worst that the settings allow: every sequence max_seq_len tokens long, all of them supervised. Seconds come from a device
profile: the named card's, this machine's measured one, or a default; the answer says which. With no budget given it takes
the card's memory and a usual machine's around it, or what is free on this machine now, less a margin. Nothing is written.

`finetune` asks the same search with its data's longest examples instead (from_data.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, together
from lopt_edge.objectives import objective_of
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.costs.teacher_pass import Teacher
from lopt_edge.plan.facts.budget import Budget, FreeBytes, make_budget
from lopt_edge.plan.facts.cards import Card, find_card, near_cards
from lopt_edge.plan.facts.device_kinds import AUTO, CPU, TORCH, TRITON, kind_of
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from lopt_edge.plan.facts.presets import find_preset, near_presets
from lopt_edge.plan.facts.profile import DeviceProfile, default_cpu_profile, load_profile, profile_of_card, profile_path
from lopt_edge.plan.schedule.processes import parts_of
from lopt_edge.plan.search.processes import in_processes
from lopt_edge.plan.search.run_plan import RunPlan, make_run_plan
from lopt_edge.plan.search.search import Candidate, Search
from lopt_edge.planning.budgets import FREE_SHARE, free_bytes, with_pinned_limit, within_granted
from lopt_edge.planning.packing import chosen_packing, settled_on_data
from lopt_edge.planning.question import Ground, LargestStep, search_for
from lopt_edge.planning.settings import (
    against_facts,
    check_memory_settings,
    chosen_settings,
    deterministic_notes,
    kernel_notes,
)
from lopt_edge.planning.unlisted import about_unlisted
from lopt_edge.units import format_bytes

if TYPE_CHECKING:
    from lopt_edge.data import Dataset

TOKEN_BYTES = 310  # of the process, for a token of the tokenizer: 44 MiB for 150,000 tokens with their merges
CONSUMER = ("desktop", "laptop")
USUAL_HOST = {"desktop": 32 << 30, "laptop": 16 << 30}  # host memory of the machine around a card, unless it is stated
NOT_GIVEN = "(none)"  # stands for data and output, which a plan does not need


def plan_run(model: str, *, gpu: str | None = None, **settings: Any) -> RunPlan:
    """Plan a run of `model` (folder, hub id or preset) on a card, or on this machine; `settings` are those of `Config`.

    Raises InputError(s) for what cannot be; a run that does not fit is an answer (`fits` is False), no error.
    """
    return answer(question(load_config(None, {"model": model, **settings}, placeholder=NOT_GIVEN), gpu=gpu))


@dataclass(frozen=True)
class Question:
    """A plan's question, read and checked; `notes` are sentences for beside the answer."""

    config: Config
    search: Search
    budget: Budget
    notes: tuple[str, ...]

    @property
    def device_type(self) -> str:
        """The kind of device that the run is planned for, named as torch does."""
        return self.search.workload.shape.device_type


def answer(asked: Question) -> RunPlan:
    """The planner's answer; for a pipeline that of all its processes."""
    kinds = CONSUMER if kind_of(asked.device_type).host_is_below else ()
    found = make_run_plan(asked.search, asked.budget, kinds_of_cards=kinds, notes=asked.notes)
    if (n := asked.config.ranks) > 1:
        shared = (
            "" if kind_of(asked.device_type).host_is_below else f"; they share this machine's RAM: {n} times that in all"
        )
        found = replace(found, notes=(*found.notes, f"each of {n} ranks takes this{shared}"))
    if asked.config.pipeline == 1:
        return found
    assert found.chosen is not None
    workload = asked.search.workload
    parts = parts_of(workload.kinds[0].segments, asked.config.pipeline)
    found, reasons = in_processes(found, workload, found.chosen.knobs, parts)
    return replace(found, notes=(*found.notes, *reasons))


def question(
    config: Config,
    *,
    gpu: str | None = None,
    largest: Callable[[Config], LargestStep] | None = None,
    train: Dataset | None = None,
) -> Question:
    """The question for these settings, on a card or on this machine. `train`, `largest`: the data, where it was read.

    Raises InputError(s): those of card and model together, then those of settings that need both.
    """
    card, (facts, vocabulary_itemsize) = together(
        lambda: None if gpu is None else _card(gpu), lambda: read_facts(config.model, config.revision)
    )
    profile = _profile(card, config.device)
    device_type = profile.device_type
    _, (course, _, max_seq_len), (budget, reasons) = together(
        lambda: check_memory_settings(config, facts, device_type=device_type),
        lambda: against_facts(config, facts),
        lambda: _budget(config, card, profile),
    )
    itemsize, notes = _itemsize(config, card, device_type)
    notes = (*about_unlisted(facts), *_what_is_planned(card, profile), *notes)
    notes = (*notes, *deterministic_notes(config, device_type), *kernel_notes(config, device_type), *course.advice)
    library_bytes = profile.library_bytes + TOKEN_BYTES * facts.vocab_size
    ground = Ground(
        facts,
        itemsize,
        profile,
        library_bytes if kind_of(device_type).counts_process else profile.context_bytes,
        vocabulary_itemsize,
        largest or partial(_worst_step, max_seq_len),
        _teacher(config, itemsize, device_type),
        budget.pinned_bytes,
        TRITON if config.kernels == TRITON else TORCH,
    )

    def ask(variant: Config) -> tuple[Question, Candidate | None]:
        search = search_for(variant, ground)
        return Question(variant, search, budget, (*reasons, *notes)), search.within(budget).best

    if max_seq_len < config.max_seq_len:
        notes = (*notes, f"the model has {max_seq_len} positions: longer sequences are cut there")
    if config.boundary is not None:
        notes = (*notes, "boundary auto is found by short runs: this plan is that of the midpoint")
    found = settled_on_data(
        config, facts, train, ask=ask, parts=lambda question: (question.config, question.search), budget=budget
    )
    chosen = (*chosen_settings(config, found.config), *chosen_packing(config, found.config))
    return replace(found, notes=(*found.notes, *chosen))


def _teacher(config: Config, itemsize: int, device_type: str) -> Teacher | None:
    """The other model that teaches; None where the settings name none. Raises InputError."""
    if config.teacher is None:
        return None
    return Teacher(*read_facts(config.teacher, None), itemsize, device_type)


def _worst_step(max_seq_len: int, config: Config) -> LargestStep:
    """The largest step that the settings allow: every sequence of the greatest length, all of it supervised."""
    evaluates = config.eval_data or config.eval_fraction or config.retention_data
    objective = objective_of(config)
    scored = 0 if objective is None else objective.together
    evaluates = evaluates or (objective is not None and objective.compares)
    if config.packing:  # each sequence fills a row
        row = MicroBatchSize(1, max_seq_len, max_seq_len - 1, in_a_row=(max_seq_len,), scored=scored)
        return LargestStep((row,) * (config.batch_size * config.grad_accum), row if evaluates else None)
    n_rows = config.batch_size * max(1, scored)
    batch = MicroBatchSize(n_rows, max_seq_len, n_rows * (max_seq_len - 1), scored=scored)
    return LargestStep((batch,) * config.grad_accum, batch if evaluates else None)


# the model -------------------------------------------------------------------------------------------------------------


def read_facts(model: str, revision: str | None) -> tuple[ModelFacts, int]:
    """The facts of a preset, folder, GGUF file or hub id, and the bytes of a number of its stored vocabulary.

    Raises InputError.
    """
    from lopt_edge.models.folder import find_model, names_a_gguf, vocabulary_itemsize
    from lopt_edge.models.hub import hub_facts

    preset = find_preset(model)
    if preset is not None and not Path(model).is_dir():
        return facts_from_config(preset.config, where=f"preset {preset.name}"), preset.itemsize
    if Path(model).expanduser().is_dir() or names_a_gguf(model):
        source = find_model(model, revision=revision, lay_out=False)
        return source.facts, vocabulary_itemsize(source)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return hub_facts(model, revision=revision)
    near = near_presets(model)
    fix = f"did you mean {', '.join(near)}?" if near else "give a folder, a GGUF file, a hub id (org/name) or a preset"
    raise InputError(f"no preset, folder or file {model[:80]!r}", where="model", fix=fix)


# the machine -----------------------------------------------------------------------------------------------------------


def _card(name: str) -> Card:
    card = find_card(name)
    if card is None:
        near = near_cards(name)
        raise InputError(
            f"unknown card {name[:60]!r}",
            where="gpu",
            fix=f"did you mean {', '.join(near)}?" if near else "state --device-memory instead",
        )
    return card


def _profile(card: Card | None, device: str) -> DeviceProfile:
    """The card's profile; else this machine's as measured, if it is of the wanted kind; else a default."""
    if card is not None:
        return profile_of_card(card)
    measured = load_profile(profile_path()) if profile_path().exists() else None
    if measured is not None and device in ("auto", measured.device_type):
        return measured
    if device != AUTO and kind_of(device).host_is_below:
        fix = "name a card (--gpu rtx4090), or run lopt-edge doctor --measure on the machine with it"
        raise InputError("no GPU was measured on this machine", where="device", fix=fix)
    return default_cpu_profile()


def _what_is_planned(card: Card | None, profile: DeviceProfile) -> tuple[str, ...]:
    """A note where the device that is planned may not be the one that the user had in mind."""
    if card is not None and card.kind == "apple":
        own = "the rates of an Apple chip's GPU are not known"
        return (f"{card.name}: {own}; this is the plan of its CPU, in float32 (--device {CPU.name})",)
    if card is None and not kind_of(profile.device_type).host_is_below:
        return ("planned for a CPU, whose memory is RAM: no GPU was measured here; --gpu NAME plans a card (--gpu list)",)
    return ()


def _itemsize(config: Config, card: Card | None, device_type: str) -> tuple[int, tuple[str, ...]]:
    """Bytes of the compute dtype, as run/device.py would choose it, and notes on that."""
    if config.compute_dtype != "auto":
        return (4 if config.compute_dtype == "float32" else 2), ()
    if kind_of(device_type).computes_on_cores:
        return 4, ("computed in float32 (a CPU with AMX would take bfloat16)",)
    if card is not None and not card.has_bf16:
        return 2, (f"computed in float16: {card.name} has no bfloat16",)
    return 2, ()


def _budget(config: Config, card: Card | None, profile: DeviceProfile) -> tuple[Budget, tuple[str, ...]]:
    """The budgets and where they come from: as stated; else the card's memory and a usual machine's around it, or what is
    free here less a margin."""
    free = free_bytes(profile) if card is None else FreeBytes(device=card.memory_bytes)
    if config.ranks > 1 and not kind_of(profile.device_type).host_is_below and free.device is not None:
        free = replace(free, device=free.device // config.ranks)
    stated = make_budget(
        device_memory=config.device_memory,
        host_memory=config.host_memory,
        disk_memory=config.disk_memory,
        pinned_memory=config.pinned_memory,
        free=free,
    )
    if card is not None:
        return _around(card, stated, ranks=config.ranks)
    stated, lowered = within_granted(
        with_pinned_limit(stated, profile.device_type), profile.device_type, ranks=config.ranks
    )
    if stated.device_bytes is not None:
        return stated, ("device memory as stated", *lowered)
    if free.device is None:
        return stated, ("no device budget: what is free here is not known", *lowered)
    margin = round(FREE_SHARE * free.device)
    each = f" for each of {config.ranks} ranks" if config.ranks > 1 else ""
    return replace(stated, device_bytes=margin), (
        f"no budget was stated: {FREE_SHARE:.0%} of the {format_bytes(free.device)} that are free here now{each}",
        *lowered,
    )


def _around(card: Card, stated: Budget, *, ranks: int) -> tuple[Budget, tuple[str, ...]]:
    """The budgets of a run on a named card, with what is usual where nothing was stated."""
    reasons = ["device memory as stated"]
    if stated.device_bytes is None:
        stated = replace(stated, device_bytes=card.memory_bytes)
        reasons = [f"all of the card's memory, {format_bytes(card.memory_bytes)}"]
    if stated.host_bytes is None and card.kind in USUAL_HOST:
        ram = USUAL_HOST[card.kind]
        stated = replace(stated, host_bytes=round(FREE_SHARE * ram / ranks))
        shared = "" if ranks == 1 else f", for {ranks} ranks"
        reasons.append(
            f"no host memory was stated: {FREE_SHARE:.0%} of the {format_bytes(ram)} that a {card.kind} usually has{shared}"
            "; --host-memory states another"
        )
    return stated, tuple(reasons)
