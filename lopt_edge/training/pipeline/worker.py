"""Processes 1 .. N - 1 of a pipeline: load your own layers, then do what process 0 asks for until it sends `end`.

A worker reads no data and writes no file of the run: batches come with each step, adapters and optimizer states go out
one group at a time when process 0 writes a checkpoint. What it needs to know of the run is one JSON text (coordinator.py),
so it cannot come to another opinion of the plan than process 0 has. It ends with process 0, whichever way that ends; its
own faults are left at the meeting place, where process 0 finds and reports them.

    launch.py starts it, with its variables in the environment; torchrun starts it as it starts any program
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, LoptError, NotFinite, PeerLost
from lopt_edge.models.folder import ModelFolder, find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.schedule.knobs import Knobs, mlp_pieces
from lopt_edge.plan.schedule.ops import GroupName, Plan
from lopt_edge.plan.schedule.processes import Part, own_knobs, parts_of
from lopt_edge.plan.schedule.validate import validate
from lopt_edge.plan.search.workload import arranged_plan
from lopt_edge.planning.settings import against_facts
from lopt_edge.run.device import DTYPES, device_of, peak_device_bytes
from lopt_edge.run.kernels.choice import choose_kernels
from lopt_edge.run.link import Link, join_store, torchrun_store
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import adapter_shapes, layer_parameters, load_adapters
from lopt_edge.run.model.replaced import apply_replaced, fit_layers, loading_placement
from lopt_edge.run.step import evaluation
from lopt_edge.run.step.batches import from_message
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.step_state import Cut, Rates
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.system.allocator import HeapWatch, release_free_memory, settle_host_allocator
from lopt_edge.system.memory import peak_rss_bytes
from lopt_edge.system.signals import HEARD
from lopt_edge.training.checkpoint.folder import STATE
from lopt_edge.training.checkpoint.snapshot import restore
from lopt_edge.training.pipeline.launch import PORT, RANK, SETUP, torchrun_rank
from lopt_edge.training.prepare.build import build_executor
from lopt_edge.training.prepare.inputs import MOST_PLANS
from lopt_edge.training.prepare.tiers import open_tiers, peaks_below
from quant.headers import read_json

START_MINUTES = 5.0  # to find process 0's meeting place, which is there before this process is


@dataclass(frozen=True, eq=False)
class Task:
    """A worker's counterpart of `Inputs`: what process 0 sent about the run, read."""

    config: Config
    source: ModelFolder
    course: Course
    targets: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    knobs: Knobs  # this process'
    parts: tuple[Part, ...]  # of a pipeline
    part: Part | None

    @lru_cache(maxsize=MOST_PLANS)  # noqa: B019 - the task lives as long as its process
    def plan(self, n_micro_batches: int, kind: str) -> Plan:
        """The validated plan of this process' part of a step; made once and kept, as process 0 does."""
        named = self.course.named[kind]
        found = arranged_plan(self.course.method, named, self.knobs, n_micro_batches=n_micro_batches, part=self.part)
        return validate(found, clip_scope=self.config.clip_scope if self.config.clip else "none")


def read_task(setup: dict[str, Any], rank: int) -> Task:
    """The task of process `rank` from the text that process 0 left. Raises InputError(s)."""
    config = Config(**setup["config"])
    source = find_model(config.model, revision=config.revision, tokenizer=config.tokenizer)
    course, targets, _ = against_facts(config, source.facts)
    parts = parts_of(course.kinds[0].segments, config.pipeline) if config.pipeline > 1 else ()
    part = parts[rank] if parts else None
    knobs: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in setup["knobs"].items()
    }
    device = device_of(torch.device(setup["device"])).for_process(int(os.environ.get("LOCAL_RANK", rank)))
    own = Knobs(**knobs) if part is None else own_knobs(Knobs(**knobs), part)
    return Task(config, source, course, targets, device, DTYPES[setup["dtype"]], own, parts, part)


def loaded_executor(task: Task, mover: Mover, setup: Mapping[str, Any], *, rank: int) -> Executor:
    """The executor of what this process has of the model, with its heap watched."""
    folder, _ = four_bit_folder(task.source, cache_dir=task.config.cache_dir)
    model = load_model(
        folder,
        task.source.facts,
        device=task.device,
        dtype=task.dtype,
        placement=loading_placement(task.knobs, task.course.replaced),
        mover=mover,
        pieces=mlp_pieces(task.knobs, task.device.type),
        kernels=choose_kernels(task.config.kernels, task.device)[0],
    )
    if setup["resumed"] is not None:
        apply_replaced(model, Path(setup["resumed"]))
    elif task.course.replaced:
        fit_layers(model, task.course.replaced)
    executor, _ = build_executor(task, model, adapter=setup["adapter"])
    if kind_of(task.device.type).counts_process:
        heap = HeapWatch(setup["trim_bytes"][rank])
        executor.observers.append(lambda op, after: None if after else heap.look())
    return executor


def go_on_from(
    executor: Executor, checkpoint: str, *, tier: str
) -> tuple[dict[int, float], Callable[[GroupName], Tensor | None]]:
    """Restore optimizer and loss scale; returns the losses of a step that was left, by segment, and its gradients."""
    folder = Path(checkpoint)
    values = read_json(folder / STATE)
    gradient = restore(executor, folder, values, tier=tier)
    executor.loss_scale = values["run"]["loss_scale"]
    return {int(segment): loss for segment, loss in values["run"]["losses"].items()}, gradient


def own_peaks(task: Task, mover: Mover) -> dict[str, int]:
    """The most bytes that this process took so far, by name."""
    return {"rss": peak_rss_bytes(), "device": peak_device_bytes(task.device), "disk": peaks_below(mover).disk}


class Worker:
    """The process between `setup` and `end`: its loaded layers, and an answer to each message."""

    def __init__(self, task: Task, link: Link, mover: Mover, setup: dict[str, Any]) -> None:
        assert task.part is not None
        self.task, self.link, self.mover, self.part = task, link, mover, task.part
        self.executor = loaded_executor(task, mover, setup, rank=link.rank)
        self.model = self.executor.model
        self.executor.link = link
        self.losses: dict[int, float] = {}
        self.gradient: Callable[[GroupName], Tensor | None] = lambda name: None
        if setup["resumed"] is not None:
            losses, self.gradient = go_on_from(self.executor, setup["resumed"], tier=task.knobs.states)
            self.losses = {segment: losses[segment] for segment in self.part.segments if segment in losses}
        link.report = partial(own_peaks, task, mover)
        release_free_memory()
        link.send_message(0, {"ready": True})

    def go(self) -> None:
        """Do what process 0 asks for, one thing after another, until it sends `end`."""
        while (message := self.link.receive_message(0))["do"] != "end":
            {
                "step": self._step,
                "evaluate": self._evaluate,
                "groups": self._groups,
                "shapes": self._shapes,
                "give": self._give,
                "load adapter": self._load_adapter,
            }[message["do"]](message)

    def _step(self, message: dict[str, Any]) -> None:
        batches = [from_message(values, self.task.device) for values in message["batches"]]
        plan = self.task.plan(len(batches), message["kind"])
        start = None if message["start"] is None else Cut(message["start"], lambda: self.losses, self.gradient)
        rates: Rates = {tuple(of) if isinstance(of, list) else of: rate for of, rate in message["rates"]}
        try:
            self.executor.run(plan, batches, step=message["step"], learning_rates=rates, start=start)
        except NotFinite:
            if self.link.broken:
                raise
            # else all processes have agreed on it: nothing was updated, and process 0 decides what comes next

    def _evaluate(self, message: dict[str, Any]) -> None:
        evaluation.work(self.model, self.link, message["token_tile"])

    def _groups(self, message: dict[str, Any]) -> None:
        groups = self.executor.optimizer.groups.values()
        self.link.send_message(
            0, {"groups": [[*group.name, group.n_elements, group.steps, group.moments is not None] for group in groups]}
        )

    def _shapes(self, message: dict[str, Any]) -> None:
        self.link.send_message(0, {"shapes": [[layer, adapter_shapes(self.model, layer)] for layer in self.model.here]})

    def _give(self, message: dict[str, Any]) -> None:
        what, (unit, target) = message["what"], message["group"]
        tensor: Tensor | None
        if what == "matrices":
            tensor = torch.cat([matrix.detach().reshape(-1).cpu() for matrix in layer_parameters(self.model, target)])
        elif what == "moments":
            tensor = self.executor.optimizer.moments_copy((unit, target))
        else:
            tensor = self.executor.optimizer.groups[unit, target].values
        assert tensor is not None, f"{unit} {target} has no {what} yet"
        self.link.send_tensor(0, tensor)

    def _load_adapter(self, message: dict[str, Any]) -> None:
        load_adapters(self.model, Path(message["folder"]))
        self.link.send_message(0, {"done": True})


def work(store: Any, rank: int, *, loopback: bool) -> None:
    """Run the whole life of this process in the run. Raises LoptError."""
    setup = json.loads(store.get(SETUP))
    for number in HEARD:  # by process 0
        signal.signal(number, signal.SIG_IGN)
    task = read_task(setup, rank)
    torch.set_num_threads(setup["threads"])
    link = Link(store, task.parts, rank, timeout=timedelta(minutes=task.config.pipeline_minutes), loopback=loopback)
    settle_host_allocator(setup["mmap_bytes"])
    device_of(task.device).settle_allocator()
    disk_bytes, journal_bytes = setup["disk_bytes"][rank], setup["journal_bytes"][rank]
    tiers = open_tiers(
        task.config,
        task.knobs,
        device=task.device,
        budget=Budget(),
        need_disk_bytes=disk_bytes,
        journal_bytes=journal_bytes,
    )
    own = device_of(task.device)
    with tiers as mover, own.made_deterministic() if task.config.deterministic else nullcontext():
        Worker(task, link, mover, setup).go()


def exit_code_of(life: Callable[..., None], store: Any, rank: int, *, loopback: bool) -> int:
    """The exit code of a process' life. A fault of this process is left for process 0; a lost peer is reported by whoever
    knows why."""
    try:
        life(store, rank, loopback=loopback)
    except PeerLost:
        return 1
    except Exception as error:
        text = str(error) if isinstance(error, LoptError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, LoptError) else 1
        store.set(f"fault {rank}", json.dumps({"text": text, "exit_code": code}))
        if not isinstance(error, LoptError):
            sys.excepthook(type(error), error, error.__traceback__)
        return code
    return 0


def work_for_torchrun(life: Callable[..., None], rank: int, *, minutes: float) -> None:
    """Follow process 0 in a process that torchrun started; one that failed exits here."""
    code = exit_code_of(life, torchrun_store(timedelta(minutes=minutes)), rank, loopback=False)
    if code:
        sys.exit(code)


def main() -> None:
    """Follow process 0 in a process that launch.py started, and exit."""
    live(work)


def live(life: Callable[..., None]) -> None:
    """Live a whole life in a process that launch.py started, and exit."""
    rank, port = int(os.environ[RANK]), int(os.environ[PORT])
    code = exit_code_of(life, join_store(port, timedelta(minutes=START_MINUTES)), rank, loopback=True)
    sys.stderr.flush()
    os._exit(code)  # a thread may still wait for a peer that is gone


def is_worker(config: Config) -> bool:
    """Whether this process is a later one of torchrun's: then it has followed process 0 to the end of the run.

    False at once in the first process, and where torchrun started none. Raises InputError where torchrun started another
    number of processes.
    """
    found = torchrun_rank()
    if found is None:
        return False
    rank, n = found
    if n != config.pipeline:
        raise InputError(
            f"torchrun started {n} processes, the settings say {config.pipeline}",
            where="pipeline",
            fix=f"use torchrun --nproc-per-node {config.pipeline}, or --pipeline {n}",
        )
    if rank and not config.dry_run:
        work_for_torchrun(work, rank, minutes=config.pipeline_minutes)
    return bool(rank)
