"""How many ranks share a run's steps: as the settings say, or as many as torchrun or accelerate launch has started.

Both launchers say it by the same variables of the environment. Where they started this process, a run without a pipeline is
shared by all of them; rank 0 is the run, the others follow it (replica.py). Where nothing started it, rank 0 starts the
others on this machine. There the CPU's cores are shared, too: each rank computes with its part of the threads, since with
all of them every rank would wait for the others' (OMP_NUM_THREADS, which torchrun sets, says otherwise).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError
from lopt_edge.run.device import accelerators, choose_device, device_of
from lopt_edge.training.pipeline.launch import torchrun_rank


def with_ranks(config: Config, warn: Callable[[str], None]) -> Config:
    """The settings with the number of ranks that a launcher started, if one did; a run of a pipeline is another matter."""
    found = torchrun_rank()
    if found is None or config.pipeline > 1 or found[1] == config.ranks:
        return config
    if config.ranks > 1:
        warn(f"ranks: {config.ranks} has no effect: the launcher started {found[1]} processes")
    return config.model_copy(update={"ranks": found[1]})


def check_cards(config: Config) -> None:
    """Refuse more ranks on this machine than it has cards: NCCL refuses two on one. Raises InputError."""
    if config.ranks == 1:
        return
    kind = device_of(choose_device(config.device)[0]).kind
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.ranks))
    n_cards = sum(one.kind is kind for one in accelerators())
    if kind.host_is_below and n_cards < here:
        what = f"{here} ranks need a {kind.title} device each, and this machine has {n_cards}"
        raise InputError(what, where="ranks", fix=f"use at most {n_cards}, or --device cpu")


@contextmanager
def shared_cores(config: Config) -> Iterator[None]:
    """A context in which this process computes with its part of the CPU's threads."""
    n_before = torch.get_num_threads()
    shares = config.ranks > 1 and torchrun_rank() is None and "OMP_NUM_THREADS" not in os.environ
    if shares:
        torch.set_num_threads(max(1, n_before // config.ranks))
    try:
        yield
    finally:
        if shares:
            torch.set_num_threads(n_before)
