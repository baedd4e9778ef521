"""Ranks 1 .. N - 1 of a run whose steps are shared: load the whole model, then do what rank 0 asks for until it says `end`.

A replica reads no data and writes no file of the run: its share of a step comes with its plan, the totals of the window and
the learning rates; after the sums over all ranks its updates are those of every other rank, so nothing is ever sent back
but losses. It has page files, tiers and a wall around its memory of its own. It prints nothing; a fault of its own is left
at the meeting place, where rank 0 finds and reports it. A signal is noted and reported with the step: rank 0 ends the run;
the second one ends this process at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch

from lopt_edge.config.settings import Config
from lopt_edge.errors import NotFinite
from lopt_edge.objectives.objective import Window as ChoiceTotals
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.schedule.ops import Plan, parse_plan
from lopt_edge.plan.schedule.ranks import Rank
from lopt_edge.run.device import device_of
from lopt_edge.run.link import Link
from lopt_edge.run.ranks import Exchange
from lopt_edge.run.step.batches import Totals, from_message
from lopt_edge.run.step.evaluation import batch_losses
from lopt_edge.run.step.step_state import Rates, Share
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.system.allocator import release_free_memory, settle_host_allocator
from lopt_edge.system.signals import Interrupts
from lopt_edge.training.pipeline.launch import SETUP, torchrun_rank
from lopt_edge.training.pipeline.worker import (
    Task,
    go_on_from,
    live,
    loaded_executor,
    own_peaks,
    read_task,
    work_for_torchrun,
)
from lopt_edge.training.prepare.tiers import hold_budget, open_tiers


class Replica:
    """The process between `setup` and `end`: its loaded model, and an answer to each message."""

    def __init__(self, task: Task, link: Link, mover: Mover, setup: Mapping[str, Any], interrupts: Interrupts) -> None:
        self.task, self.link, self.mover, self.interrupts = task, link, mover, interrupts
        budget = Budget(device_bytes=setup["budget_bytes"])
        self.executor = loaded_executor(task, mover, setup, rank=link.rank)
        if setup["resumed"] is not None:
            go_on_from(self.executor, setup["resumed"], tier=task.knobs.states)
        self.plans: dict[str, Plan] = {}
        link.report = self._report
        release_free_memory()
        link.send_message(0, {"ready": True})
        self.executor.link, self.executor.peers.exchange = link, Exchange(link, task.device)
        hold_budget(budget, task.device, context_bytes=setup["context_bytes"])

    def _report(self) -> dict[str, int]:
        return {**own_peaks(self.task, self.mover), "signal": self.interrupts.signal_number or 0}

    def go(self) -> None:
        """Do what rank 0 asks for, one thing after another, until it sends `end`."""
        while (message := self.link.receive_message(0, patient=True))["do"] != "end":
            {"step": self._step, "evaluate": self._evaluate}[message["do"]](message)

    def _step(self, message: dict[str, Any]) -> None:
        if message["forget"]:
            self.plans.clear()
        if message["text"] is not None:
            self.plans[message["plan"]] = parse_plan(message["text"])
        batches = [from_message(values, self.task.device) for values in message["batches"]]
        rates: Rates = {tuple(of) if isinstance(of, list) else of: rate for of, rate in message["rates"]}
        window = message["totals"]["window"]
        totals = Totals(**{**message["totals"], "window": None if window is None else ChoiceTotals(**window)})
        self.executor.loss_scale = message["scale"]
        plan, share = self.plans[message["plan"]], Share(message["first"], totals)
        try:
            self.executor.run(plan, batches, step=message["step"], learning_rates=rates, share=share)
        except NotFinite:
            if self.link.broken:
                raise
            # else all ranks have agreed on it: nothing was updated, and rank 0 decides what comes next

    def _evaluate(self, message: dict[str, Any]) -> None:
        model, tile, layers = self.executor.model, message["token_tile"], message["layers"]
        batches = (from_message(values, self.task.device) for values in message["batches"])
        self.link.send_message(0, {"losses": [batch_losses(model, batch, tile, layers) for batch in batches]})


def follow(store: Any, rank: int, *, loopback: bool) -> None:
    """Run the whole life of this process in the run. Raises LoptError."""
    interrupts = Interrupts()
    with interrupts.listening(), interrupts.deferred():
        setup = json.loads(store.get(SETUP))
        torch.set_num_threads(setup["threads"])
        task = read_task(setup, rank)
        ranks, timeout = [Rank(each) for each in range(task.config.ranks)], task.config.pipeline_minutes
        link = Link(store, ranks, rank, timeout=timedelta(minutes=timeout), whole="", loopback=loopback)
        settle_host_allocator(setup["mmap_bytes"])
        own = device_of(task.device)
        own.settle_allocator()
        tiers = open_tiers(
            task.config,
            task.knobs,
            device=task.device,
            budget=Budget(),
            need_disk_bytes=setup["disk_bytes"][rank],
            journal_bytes=setup["journal_bytes"][rank],
        )
        with tiers as mover, own.made_deterministic() if task.config.deterministic else nullcontext():
            Replica(task, link, mover, setup, interrupts).go()


def main() -> None:
    """Follow rank 0 in a process that it started (leader.py), and exit."""
    live(follow)


def is_replica(config: Config) -> bool:
    """Whether this process is a later rank of a launcher's: then it has followed rank 0 to the end of the run."""
    found = torchrun_rank()
    if config.ranks == 1 or found is None or not found[0]:
        return False
    if not config.dry_run:
        work_for_torchrun(follow, found[0], minutes=config.pipeline_minutes)
    return True
