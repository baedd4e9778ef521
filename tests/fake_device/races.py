"""A GPU's streams played on the CPU, with vector clocks: what may happen at once is told from what must come first.

The CPU stands for a card (its kind has a host tier below it, its copies go to side streams), so the real movement code
runs on real tensors, while a dispatch mode notes for every op which actor reads and writes which bytes: the computing
stream, one of the two side streams, the host, or a job of a worker. An actor knows of another's doings only by what the
code says: an event that is waited for, a job's result that is taken, a launch (a stream knows what its launcher knew). Two
accesses to the same bytes of which one writes, where the later actor does not know of the earlier one, are a race: on a
card they may come in the other order. So is memory that is freed while an actor may still use it, since the allocator hands
it to the next computation.

A worker's job runs when it is submitted or when its result is asked for (`lazy`); both must hold. It cannot see kernels
that keep memory inside, nor what another process does.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lopt_edge.plan.facts import device_kinds
from lopt_edge.plan.facts.device_kinds import CUDA
from lopt_edge.run import device as devices
from lopt_edge.run.devices.host import Host
from lopt_edge.run.tiers import moves, weights
from lopt_edge.run.tiers.pinned import PinnedPool
from lopt_edge.run.tiers.staging import Room, Stage

COMPUTE, HOST = "compute", "host"
SIDES = ("up", "down")  # in the order in which a mover asks for them
N_NAMES = 8  # of jobs, in turn: each is a column of every clock
Clock = dict[str, int]


@dataclass(frozen=True)
class Access:
    """One access: bytes [start, stop) of a storage, by whom, when on its own clock."""

    start: int
    stop: int
    actor: str
    time: int
    writes: bool


class Races(TorchDispatchMode):
    """The mode, and the clocks. `found` counts races by what they are."""

    def __init__(self, *, lazy: bool, seed: int = 0) -> None:
        super().__init__()
        self.lazy, self.pick = lazy, random.Random(seed)
        self.clocks: dict[str, Clock] = defaultdict(dict)
        self.memory: dict[int, list[Access]] = {}
        self.found: Counter[str] = Counter()
        self.thread, self.stream, self.n_jobs = HOST, COMPUTE, 0
        self.bytes_of: Tensor | None = None  # whose bytes were asked for last
        self.quiet = False

    # clocks ----------------------------------------------------------------------------------------------------------

    def learn(self, actor: str, clock: Clock) -> None:
        """Let an actor know all that a clock knows."""
        own = self.clocks[actor]
        for other, time in clock.items():
            own[other] = max(own.get(other, 0), time)

    def tick(self, actor: str) -> int:
        self.clocks[actor][actor] = self.clocks[actor].get(actor, 0) + 1
        return self.clocks[actor][actor]

    def knows(self, actor: str, access: Access) -> bool:
        return access.actor == actor or self.clocks[actor].get(access.actor, 0) >= access.time

    # accesses --------------------------------------------------------------------------------------------------------

    def touch(self, actor: str, tensor: Tensor, *, writes: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.memory:
            self.memory[key] = []
            weakref.finalize(storage, self.freed, key).atexit = False
        size = tensor.element_size()
        start = tensor.storage_offset() * size
        reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        now = Access(start, start + reach * size if tensor.numel() else start, actor, self.clocks[actor][actor], writes)
        kept = []
        for old in self.memory[key]:
            apart = old.stop <= now.start or now.stop <= old.start
            if not apart and (old.writes or writes) and not self.knows(actor, old):
                self.found[f"{_doing(old)}, {_doing(now)}"] += 1
            covered = now.start <= old.start and old.stop <= now.stop
            if not (covered and (writes or (old.actor == actor and not old.writes))):
                kept.append(old)
        self.memory[key] = [*kept, now]

    def freed(self, key: int) -> None:
        for access in self.memory.pop(key, []):
            if not (self.knows(COMPUTE, access) or self.knows(HOST, access)):
                self.found[f"freed while in use by {access.actor[:3]}"] += 1

    def by_thread(self, tensor: Tensor, *, writes: bool) -> None:
        """An access by the host's thread, or a worker's job, itself."""
        self.tick(self.thread)
        self.touch(self.thread, tensor, writes=writes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.quiet:
            return result
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":  # the host waits for the number
            self.learn(self.thread, self.clocks[COMPUTE])
            return result
        returns = func._schema.returns
        is_view = bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        if is_view or name.startswith(("empty", "new_empty", "set_", "detach")):
            return result
        self.learn(self.stream, self.clocks[self.thread])
        self.tick(self.stream)
        written, read = _sides(func._schema, args, kwargs or {})
        for tensor in read:
            self.touch(self.stream, tensor, writes=False)
        for tensor in (*written, *(one for one in _tensors(result) if all(one is not other for other in written))):
            self.touch(self.stream, tensor, writes=True)
        return result


def _doing(access: Access) -> str:
    return f"{'write' if access.writes else 'read'} by {access.actor[:3]}"


def _sides(schema: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call writes to, and those that it reads."""
    written: list[Tensor] = []
    read: list[Tensor] = []
    for index, argument in enumerate(schema.arguments):
        value = kwargs.get(argument.name, args[index] if index < len(args) else None)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        (written if writes else read).extend(_tensors(value))
    return written, read


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in _tensors(one)] if isinstance(value, list | tuple) else []


# what is played ---------------------------------------------------------------------------------------------------------


@dataclass
class Event:
    """A mark: what its stream knew and had been given when it was put."""

    races: Races
    clock: Clock

    def query(self) -> bool:
        """Whether it has passed, which may be so or not; who hears that it has knows it."""
        passed = self.races.pick.random() < 0.5
        if passed:
            self.synchronize()
        return passed

    def synchronize(self) -> None:
        self.races.learn(self.races.thread, self.clock)


@dataclass
class Stream:
    races: Races
    name: str

    def record_event(self) -> Event:
        self.races.learn(self.name, self.races.clocks[self.races.thread])
        return Event(self.races, dict(self.races.clocks[self.name]))

    def mark_compute(self) -> Event:
        self.races.learn(COMPUTE, self.races.clocks[self.races.thread])
        return Event(self.races, dict(self.races.clocks[COMPUTE]))

    def after(self, mark: Event | None) -> AbstractContextManager[None]:
        self.races.learn(self.name, {} if mark is None else mark.clock)
        return self._current()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        before, self.races.stream = self.races.stream, self.name
        try:
            yield
        finally:
            self.races.stream = before

    def hold_compute(self, mark: Event) -> None:
        self.races.learn(COMPUTE, mark.clock)

    def synchronize(self) -> None:
        self.races.learn(self.races.thread, self.races.clocks[self.name])


@dataclass
class Job:
    """A worker's job, an actor of its own: it knows what its submitter knew, and its taker gets to know what it does."""

    races: Races
    work: Callable[[], Any]
    name: str
    known: Clock
    over: bool = False
    value: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        if self.over:
            return
        self.over, before = True, self.races.thread
        self.races.thread = self.name
        self.races.learn(self.name, self.known)
        try:
            self.value = self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.races.thread = before

    def exception(self) -> BaseException | None:
        self.run()
        self.races.learn(self.races.thread, self.races.clocks[self.name])
        return self.error

    def result(self) -> Any:
        if (error := self.exception()) is not None:
            raise error
        return self.value

    def done(self) -> bool:
        return self.over


@dataclass
class Workers:
    races: Races
    jobs: list[Job] = field(default_factory=list)

    def submit(self, work: Callable[..., Any], *given: Any) -> Job:
        self.races.n_jobs += 1
        job = Job(
            self.races, lambda: work(*given), f"job{self.races.n_jobs:06d}", dict(self.races.clocks[self.races.thread])
        )
        self.jobs = [*(one for one in self.jobs if not one.over), job]
        if not self.races.lazy:
            job.run()
        return job

    def shutdown(self, wait: bool = True) -> None:
        for job in self.jobs:
            job.run()


def install(patch: pytest.MonkeyPatch, races: Races) -> None:
    """Let the CPU stand for a card, and workers and files tell the clocks what they do."""
    row, names = replace(CUDA, name="cpu", attention_bytes=0), itertools.cycle(SIDES)

    class Disguised(Host):
        kind = row

        def side_stream(self) -> Any:
            return Stream(races, next(names))

        def pin(self, block: Tensor) -> bool:
            return True

    patch.setitem(device_kinds.KINDS, "cpu", row)
    patch.setitem(devices.CLASSES, "cpu", Disguised)
    patch.setattr(moves, "ThreadPoolExecutor", lambda *_, **__: Workers(races))
    patch.setattr(moves.Mover, "_start_workers", lambda self: None)
    take, give = PinnedPool.take, PinnedPool.give

    def take_told(self: PinnedPool, n_bytes: int) -> Tensor:
        block = take(self, n_bytes)
        races.learn(races.thread, races.clocks["pool"])  # its lock: who takes knows what those knew who gave
        return block

    def give_told(self: PinnedPool, block: Tensor, *, after: Any = None) -> None:
        races.learn("pool", races.clocks[races.thread])
        give(self, block, after=after)

    patch.setattr(PinnedPool, "take", take_told)
    patch.setattr(PinnedPool, "give", give_told)
    room, put = Stage.room, Stage.put

    def room_told(self: Stage, shape: tuple[int, ...], dtype: torch.dtype) -> Room:
        found = room(self, shape, dtype)
        races.by_thread(found.host, writes=True)  # the host is about to
        return found

    def put_told(self: Stage, tensor: Tensor, *, dtype: torch.dtype | None = None) -> Room:
        races.quiet = True  # this copy is the host's own, and its room was told
        try:
            return put(self, tensor, dtype=dtype)
        finally:
            races.quiet = False

    patch.setattr(Stage, "room", room_told)
    patch.setattr(Stage, "put", put_told)
    tensor_bytes, read_layout, file = moves.tensor_bytes, weights._read, moves.PageFile

    def remembered(tensor: Tensor) -> memoryview:
        races.bytes_of = tensor
        return tensor_bytes(tensor)

    def told(method: Callable[..., Any], *, writes: bool) -> Callable[..., Any]:
        def call(self: Any, offset: int, data: Any) -> Any:
            assert races.bytes_of is not None
            races.by_thread(races.bytes_of, writes=writes)
            return method(self, offset, data)

        return call

    def read(layout: Any, buffer: Tensor) -> None:
        races.by_thread(buffer, writes=True)
        read_layout(layout, buffer)

    patch.setattr(moves, "tensor_bytes", remembered)
    patch.setattr(file, "write", told(file.write, writes=False))
    patch.setattr(file, "read", told(file.read, writes=True))
    patch.setattr(weights, "_read", read)
