"""Movements of tensors between device, host and disk, each begun by one call and ended by another.

An `OffloadedTensor` is one tensor that may be on the device, below (in pinned host memory, or in the page file), or both.
The rules:
- what a movement reads or overwrites stays alive and untouched until `wait`: the device copy is let go only there, a new
  device tensor is handed out only there;
- disk work is done by worker threads with positioned reads and writes; on a GPU copies up run on one stream and copies down
  on another, since a link carries both ways at once (plan/costs/seconds.py counts on it); each is ordered against the
  computing stream by events in both directions, because a buffer that is overwritten too early trains on garbage while the
  loss still falls. The two streams know each other through the computing one only: a WAIT holds that, a mark of it begins
  the next copy;
- what the host itself makes for the device goes up in another way (staging.py);
- a fault of a worker appears at `wait`, as a RunError.
An offloaded tensor may name the page file that its copies go to; that is for what must outlive damage to the other one
(run/step/optim.py).

`delay` is for tests: called in the worker with the name of the movement's stage, it may sleep, so that a missing wait shows
(tests/laws/test_memory_features.py). What moves where and when is written in the plan; nothing is decided here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopt_edge.errors import RunError
from lopt_edge.run.device import device_of
from lopt_edge.run.devices.interface import SideStream
from lopt_edge.run.tiers.page_file import PageFile
from lopt_edge.run.tiers.pinned import PinnedPool
from lopt_edge.run.tiers.staging import Stage
from quant.files import tensor_bytes
from quant.headers import FolderError

N_WORKERS = 2
Delay = Callable[[str], None]


@dataclass(eq=False)
class OffloadedTensor:
    """A tensor and its copy below. `tensor` is None while only the copy is there."""

    tensor: Tensor | None
    host: Tensor | None = None
    offset: int | None = None  # in the page file
    file: PageFile | None = None  # another page file than the mover's
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    n_bytes: int = 0
    pending: Callable[[], None] | None = None  # ends the movement under way

    @property
    def is_below(self) -> bool:
        """Whether there is a copy in host memory or in a page file."""
        return self.host is not None or self.offset is not None

    def here(self) -> Tensor:
        """The tensor on the device. Raises RuntimeError while it is only below, or while a movement is under way."""
        if self.tensor is None or self.pending is not None:
            raise RuntimeError("this tensor is not on the device")
        return self.tensor


class Mover:
    """The mover of offloaded tensors between tiers. The disk tier needs `page_file`, the host tier of a GPU `pinned`.

    `journal_file` takes the optimizer's undo copies; without it they go to `page_file`, and are lost with that.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        page_file: PageFile | None = None,
        journal_file: PageFile | None = None,
        pinned: PinnedPool | None = None,
        delay: Delay | None = None,
    ) -> None:
        self.device, self.page_file, self.journal_file, self.delay = device, page_file, journal_file, delay
        self.pinned = pinned or PinnedPool(device)
        self.workers = ThreadPoolExecutor(N_WORKERS, thread_name_prefix="lopt-move")
        self._start_workers()
        own = device_of(device)
        self.going_up, self.going_down = own.side_stream(), own.side_stream()  # None where copies need no stream
        self.stage = Stage(device, self.pinned, self.after_compute) if self.pinned.is_tier else None
        self.bytes_moved = 0

    def _start_workers(self) -> None:
        """Start all workers now, not with the first jobs.

        A thread that begins where memory has just run out may die before it says that it began, and whoever starts it
        waits for ever (seen under RLIMIT_DATA, Python 3.11).
        """
        barrier = threading.Barrier(N_WORKERS + 1)
        for _ in range(N_WORKERS):
            self.workers.submit(barrier.wait)
        barrier.wait()

    # the side streams ------------------------------------------------------------------------------------------------

    @property
    def has_streams(self) -> bool:
        """Whether copies run beside the computing stream."""
        return self.going_up is not None

    def after_compute(self) -> Any:
        """A mark on the computing stream that a copy of a side stream must wait for (None on the CPU)."""
        return None if self.going_up is None else self.going_up.mark_compute()

    def before_compute(self, event: Any) -> None:
        """Let the computing stream wait for a side stream's event."""
        if self.going_up is not None and event is not None:
            self.going_up.hold_compute(event)

    def copy_up(self, target: Tensor, source: Tensor, *, after: Any, stage: str = "copy") -> Any:
        """Copy pinned memory to the device beside the computing stream, once the mark `after` is passed.

        Returns the copy's event; on the CPU it is over by then, and there is none.
        """
        return self._copy(self.going_up, target, source, after, stage)

    def copy_down(self, target: Tensor, source: Tensor) -> Any:
        """Copy from the device to pinned memory beside the computing stream, once that is where it is now; returns the
        copy's event."""
        return self._copy(self.going_down, target, source, self.after_compute(), "copy")

    def _copy(self, stream: SideStream | None, target: Tensor, source: Tensor, after: Any, stage: str) -> Any:
        with self.on_side(stream, after):
            self.pause(stage)
            target.copy_(source, non_blocking=True)
            return None if stream is None else stream.record_event()

    def on_side(self, stream: SideStream | None, mark: Any) -> AbstractContextManager[Any]:
        """A context in which work goes to a side stream, after `mark`; on the CPU it does nothing."""
        return nullcontext() if stream is None else stream.after(mark)

    def submit(self, name: str, work: Callable[[], None]) -> Future[None]:
        """Run `work` in a worker; `result_of` makes RunErrors of its faults. `name` is that of the stage, for `delay`."""

        def run() -> None:
            self.pause(name)
            work()
            self.pause(name)

        return self.workers.submit(run)

    def pause(self, name: str) -> None:
        """Call a test's `delay` with the stage's name, if there is one."""
        if self.delay is not None:
            self.delay(name)

    # offloaded tensors -----------------------------------------------------------------------------------------------

    def down(self, offloaded: OffloadedTensor, tier: str) -> None:
        """Begin to copy the tensor to `tier` ("host" or "disk"); `wait` ends that and lets the device copy go."""
        tensor = offloaded.here().contiguous()
        offloaded.tensor, offloaded.shape, offloaded.dtype, offloaded.n_bytes = (
            tensor,
            tuple(tensor.shape),
            tensor.dtype,
            tensor.nbytes,
        )
        self.bytes_moved += tensor.nbytes
        if tier == "host":
            if offloaded.host is None:
                offloaded.host = self.pinned.take(tensor.nbytes)
            event = self.copy_down(offloaded.host, _flat(tensor))
            offloaded.pending = _in_turn(lambda: self.before_compute(event), lambda: self._let_go(offloaded))
            return
        file = self._file(offloaded)
        if offloaded.offset is None:
            offloaded.offset = file.allocate(tensor.nbytes)
        offset = offloaded.offset
        if not self.has_streams:
            job = self.submit("write", lambda: file.write(offset, tensor_bytes(tensor)))
            offloaded.pending = _in_turn(lambda: result_of(job), lambda: self._let_go(offloaded))
            return
        staging = self.pinned.take(tensor.nbytes)
        event = self.copy_down(staging, _flat(tensor))

        def write() -> None:
            event.synchronize()
            file.write(offset, tensor_bytes(staging))
            self.pinned.give(staging)

        job = self.submit("write", write)
        offloaded.pending = _in_turn(lambda: result_of(job), lambda: self._let_go(offloaded))

    def up(self, offloaded: OffloadedTensor) -> None:
        """Begin to bring the tensor back to the device; `wait` ends that. The copy below stays until `free`."""
        tensor = torch.empty(offloaded.shape, dtype=offloaded.dtype, device=self.device)
        self.bytes_moved += tensor.nbytes

        def arrive() -> None:
            offloaded.tensor = tensor

        if offloaded.host is not None:
            event = self.copy_up(_flat(tensor), offloaded.host, after=self.after_compute())
            offloaded.pending = _in_turn(lambda: self.before_compute(event), arrive)
            return
        if offloaded.offset is None:
            raise RuntimeError("this offloaded tensor has no copy below")
        job = self.submit("read", self._reader(self._file(offloaded), offloaded.offset, tensor, self.after_compute()))
        offloaded.pending = _in_turn(lambda: result_of(job), arrive)

    def _reader(self, file: PageFile, offset: int, tensor: Tensor, mark: Any) -> Callable[[], None]:
        if not self.has_streams:
            return lambda: file.read(offset, tensor_bytes(tensor))

        def read() -> None:
            staging = self.pinned.take(tensor.nbytes)
            file.read(offset, tensor_bytes(staging))
            self.copy_up(_flat(tensor), staging, after=mark).synchronize()
            self.pinned.give(staging)

        return read

    def wait(self, offloaded: OffloadedTensor) -> None:
        """End the movement under way. Raises RunError if it failed."""
        pending, offloaded.pending = offloaded.pending, None
        if pending is not None:
            pending()

    def look(self, offloaded: OffloadedTensor) -> Tensor:
        """The values on the CPU (not to be changed), wherever they are; the offloaded tensor stays as it is."""
        if offloaded.tensor is not None:
            return offloaded.tensor.detach().cpu()
        if offloaded.host is not None:
            if self.going_down is not None:
                self.going_down.synchronize()
            return offloaded.host[: offloaded.n_bytes].clone().view(offloaded.dtype).view(offloaded.shape)
        if offloaded.offset is None:
            raise RuntimeError("this offloaded tensor is nowhere")
        found = torch.empty(offloaded.shape, dtype=offloaded.dtype)
        self._file(offloaded).read(offloaded.offset, tensor_bytes(found))
        return found

    def drop(self, offloaded: OffloadedTensor) -> None:
        """Let the device copy go; the copy below stays."""
        offloaded.here()
        self._let_go(offloaded)

    def settle(self, offloaded: OffloadedTensor) -> None:
        """End the movement under way and ignore how it ends; for use after a fault, which was raised already."""
        with suppress(Exception):
            self.wait(offloaded)

    def free(self, offloaded: OffloadedTensor) -> None:
        """Let the device copy and the copy below go; a movement under way is ended first."""
        self.settle(offloaded)
        offloaded.tensor = None
        if offloaded.host is not None:
            self.pinned.give(offloaded.host, after=self.after_compute())
        if offloaded.offset is not None:
            self._file(offloaded).free(offloaded.offset)
        offloaded.host = offloaded.offset = None

    def _let_go(self, offloaded: OffloadedTensor) -> None:
        offloaded.tensor = None

    def _file(self, offloaded: OffloadedTensor) -> PageFile:
        file = offloaded.file or self.page_file
        if file is None:
            raise RuntimeError("the plan pages to disk, but there is no page file")
        return file

    def close(self) -> None:
        """Wait for the workers and remove the page files. May be called twice."""
        self.workers.shutdown(wait=True)
        for file in (self.page_file, self.journal_file):
            if file is not None:
                file.close()
        self.pinned.close()


def _in_turn(first: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    """Both calls as one; the second is not made if the first raises."""

    def both() -> None:
        first()
        then()

    return both


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def result_of(job: Future[None]) -> None:
    """Wait for a worker's job. Raises RunError for what a file or the disk did wrong."""
    try:
        job.result()
    except FolderError as error:
        raise RunError(str(error), fix="check the disk, and that nothing changes the model's files during a run") from None
    except OSError as error:
        raise RunError(
            f"a file could not be read or written ({error.strerror or error})", where=str(error.filename or "")
        ) from None
