"""The link between the processes of a run, a pipeline's or ranks that share each step: who is there, and messages.

Two kinds of things pass; the gradients of ranks are a third, and ranks.py's matter. Boundaries (hidden states) go from each
process of a pipeline to the next one, at most MOST_IN_FLIGHT of them sent and not yet taken, so that a quick process does
not fill its memory with what a slow one has no time for. Messages (JSON, and tensors by name) go between process 0 and each
of the others: what to do next, whether all numbers are finite, what came out. Both travel by gloo over TCP, boundaries of a
GPU through host memory: consumer cards have no peer-to-peer copies, two processes may share one card (NCCL refuses that),
and a broken connection is noticed at once (an NCCL call would hang). A boundary of 2,048 tokens of an 8B model is 16 MiB.

The rules: a peer that died or says nothing for too long becomes a PeerLost that names it, never a hang; waiting happens in
a thread, so that signals are heard and `alive` is asked meanwhile; after a PeerLost the link is of no use any more.
Everything is sent in the order in which it is asked for, and nobody asks out of order: what to send is the plan's matter.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as distributed
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed does not export them to checkers
from torch.distributed.rendezvous import rendezvous

from lopt_edge.errors import NotFinite, PeerLost, RunError
from lopt_edge.plan.schedule.ops import MOST_IN_FLIGHT, GroupName

CONNECT_TIMEOUT = timedelta(minutes=1)  # for processes that are all there
PATIENCE = timedelta(days=30)  # while process 0 evaluates or saves; that it is gone is noticed at once
POLL_SECONDS = 0.2  # between two looks at signals and at the other processes, while waiting
MOST_MESSAGE_BYTES = 1 << 30
LOOPBACK = "127.0.0.1"


class Member(Protocol):
    """One process of a run: a part of a pipeline, or a rank."""

    @property
    def rank(self) -> int: ...

    def text(self) -> str:
        """The process in words, for people."""


@dataclass(frozen=True)
class FarGroup:
    """What is known here of a parameter group in another process of a pipeline."""

    n_elements: int
    steps: int
    has_moments: bool


class FarGroups(Protocol):
    """The parameter groups in the other processes of a pipeline, and access to their tensors."""

    @property
    def groups(self) -> Mapping[GroupName, FarGroup]: ...

    def tensor(self, what: str, name: GroupName, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A group's `values` or `moments` (`what` says which), on the CPU."""


def host_store(n: int, timeout: timedelta) -> TCPStore:
    """Open process 0's meeting place on a free port of the loopback; torch alone would listen on every interface."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen()
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, n, True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach())


def join_store(port: int, timeout: timedelta) -> TCPStore:
    """Join the meeting place that process 0 opened on this port of this machine."""
    return TCPStore(LOOPBACK, port, None, False, timeout=timeout, wait_for_workers=False)


def torchrun_store(timeout: timedelta) -> Store:
    """The meeting place that torchrun's variables name."""
    store: Store = next(iter(rendezvous("env://", timeout=timeout)))[0]
    return store


class Link:
    """One process' end of the link. `parts` are all processes, `whole` says of what, in messages. `alive` is called while
    it waits, and raises if a peer is known to be dead.

    `report` gives what process 0 shall know of this process after each step; `reports` are those of the last step, by
    process. Every method that sends or receives raises PeerLost when the peer is gone or silent for longer than `timeout`.
    """

    def __init__(
        self,
        store: Store,
        parts: Sequence[Member],
        rank: int,
        *,
        timeout: timedelta,
        whole: str = " of the pipeline",
        loopback: bool = True,
        alive: Callable[[], None] = lambda: None,
        report: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self.store, self.parts, self.rank, self.timeout, self.alive = store, tuple(parts), rank, timeout, alive
        self.whole, self.loopback = whole, loopback
        self.report = report
        self.reports: list[dict[str, int]] = [{} for _ in parts]
        self.broken = False
        self._in_flight: deque[tuple[Any, Tensor]] = deque()
        self._meet()
        self._control, self._data = self.group("control"), self.group("data")

    @property
    def part(self) -> Member:
        """This process."""
        return self.parts[self.rank]

    @property
    def is_last(self) -> bool:
        """Whether this is the last process."""
        return self.rank == len(self.parts) - 1

    def _meet(self) -> None:
        """Wait until all processes are there. It polls: whoever waits inside the store keeps others from asking it."""
        self.store.set(f"here {self.rank}", "")
        keys = [f"here {part.rank}" for part in self.parts]
        deadline = time.monotonic() + self.timeout.total_seconds()
        while not self.store.check(keys):
            self._ask_alive()
            missing = [part.rank for part in self.parts if not self.store.check([f"here {part.rank}"])]
            if missing and time.monotonic() > deadline:
                self.broken = True
                raise self._lost(missing[0], RuntimeError("timeout"))
            time.sleep(POLL_SECONDS / 4)

    def group(self, name: str, *, timeout: timedelta = CONNECT_TIMEOUT) -> Any:
        """A gloo group of all processes, made without torch's global one: a program may have several runs in turn."""
        gloo = distributed.ProcessGroupGloo
        options = gloo._Options()  # type: ignore[attr-defined]  # torch's stub calls it Options
        options._timeout = timeout
        options._devices = [gloo.create_device(hostname=LOOPBACK) if self.loopback else gloo.create_default_device()]
        store = PrefixStore(name, self.store)
        return self._wait(None, lambda: gloo(store, self.rank, len(self.parts), options))

    def group_on_devices(self, name: str) -> Any:
        """An NCCL group of all processes, each on the current device of its own; made when all ask for it."""
        nccl = distributed.ProcessGroupNCCL  # builds of torch without CUDA have none
        options = nccl.Options()
        options._timeout = self.timeout
        store = PrefixStore(name, self.store)
        return self._wait(None, lambda: nccl(store, self.rank, len(self.parts), options))

    def wait_for(self, job: Future[None]) -> None:
        """Wait until a thread has done what all processes take part in. Raises PeerLost if one is gone, or silent."""
        while True:
            try:
                return job.result(POLL_SECONDS)
            except TimeoutError:
                self._ask_alive()
            except RuntimeError as error:
                self.broken = True
                raise self._lost(None, error) from None

    def _wait(self, peer: int | None, call: Callable[[], Any]) -> Any:
        """The call's result. It runs in a thread: it cannot be stopped, and must delay neither signals nor the exit."""
        found: list[Any] = []

        def run() -> None:
            try:
                found.append((call(), None))
            except Exception as error:
                found.append((None, error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if thread.is_alive():
                self._ask_alive()
        result, error = found[0]
        if error is None:
            return result
        self.broken = True
        if not isinstance(error, RuntimeError):
            raise error
        raise self._lost(peer, error) from None

    def _ask_alive(self) -> None:
        try:
            self.alive()
        except Exception:
            self.broken = True
            raise

    def _lost(self, peer: int | None, error: RuntimeError) -> PeerLost:
        who = "the other processes" if peer is None else self.parts[peer].text()
        silent = "imed out" in str(error) or "imeout" in str(error)
        minutes = self.timeout.total_seconds() / 60
        what = f"said nothing for {minutes:g} minutes" if silent else "broke the connection"
        return PeerLost(f"{who}{self.whole} {what}", fix="--pipeline-minutes sets how long to wait")

    # boundaries ------------------------------------------------------------------------------------------------------

    def send_boundary(self, hidden: Tensor) -> None:
        """Send hidden states to the next process. It returns at once, unless MOST_IN_FLIGHT of them are under way."""
        flat = _bytes_of(hidden.detach().contiguous().cpu())
        while len(self._in_flight) >= MOST_IN_FLIGHT:
            self._finish_oldest()
        self._in_flight.append((self._data.send([flat], self.rank + 1, 0), flat))

    def receive_boundary(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Receive hidden states of this shape and dtype from the process before, onto `device`."""
        hidden = torch.empty(*shape, dtype=dtype)
        self._wait(self.rank - 1, lambda: self._data.recv([_bytes_of(hidden)], self.rank - 1, 0).wait(self.timeout))
        return hidden.to(device)

    def _finish_oldest(self) -> None:
        work, _ = self._in_flight[0]
        self._wait(self.rank + 1, lambda: work.wait(self.timeout))
        self._in_flight.popleft()

    def flush(self) -> None:
        """Wait until the next process has taken all that was sent."""
        while self._in_flight:
            self._finish_oldest()

    # messages between process 0 and another one ----------------------------------------------------------------------

    def send_message(self, peer: int, message: Mapping[str, Any]) -> None:
        """Send JSON values to one process. Their bytes are no tensor of this thread, so no op is counted with them."""
        payload = bytearray(json.dumps(message).encode())
        self.send_tensor(peer, torch.tensor([len(payload)]))

        def send() -> None:
            self._control.send([torch.frombuffer(payload, dtype=torch.uint8)], peer, 0).wait(self.timeout)

        self._wait(peer, send)

    def receive_message(self, peer: int, *, patient: bool = False) -> dict[str, Any]:
        """Receive the JSON values that `peer` sends; `patient`: however long it has nothing to say.

        Raises RunError for a size that no message has.
        """
        n_bytes = int(self.receive_tensor(peer, (1,), torch.int64, timeout=PATIENCE if patient else None))
        if not 0 < n_bytes <= MOST_MESSAGE_BYTES:
            raise RunError(f"a message of {n_bytes} bytes came from {self.parts[peer].text()}")
        payload = bytearray(n_bytes)

        def receive() -> None:
            self._control.recv([torch.frombuffer(payload, dtype=torch.uint8)], peer, 0).wait(self.timeout)

        self._wait(peer, receive)
        return dict(json.loads(payload))

    def send_tensor(self, peer: int, tensor: Tensor) -> None:
        """Send the bytes of a tensor to one process, and wait until they are taken; an empty tensor sends nothing."""
        flat = _bytes_of(tensor.detach().contiguous().cpu())
        if len(flat):
            self._wait(peer, lambda: self._control.send([flat], peer, 0).wait(self.timeout))

    def receive_tensor(
        self, peer: int, shape: Sequence[int], dtype: torch.dtype, *, timeout: timedelta | None = None
    ) -> Tensor:
        """Receive a tensor of this shape and dtype from one process, on the CPU."""
        tensor = torch.empty(*shape, dtype=dtype)
        if tensor.numel():
            self._wait(peer, lambda: self._control.recv([_bytes_of(tensor)], peer, 0).wait(timeout or self.timeout))
        return tensor

    @property
    def others(self) -> range:
        """The ranks of all processes but process 0."""
        return range(1, len(self.parts))

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Send JSON values from process 0 to all others."""
        for peer in self.others:
            self.send_message(peer, message)

    def agree(self, fault: NotFinite | None, op: str) -> None:
        """Exchange whether all numbers are finite; NotFinite is raised in every process if those of one are not.

        `fault` is this process' own, found in the op of text `op`.
        """
        own = None if fault is None else {"what": str(fault).splitlines()[0], "op": op, "of_loss": fault.of_loss}
        if self.rank:
            self.send_message(0, {"fault": own})
            found = self.receive_message(0)["fault"]
        else:
            votes = [own, *(self.receive_message(peer)["fault"] for peer in self.others)]
            faults = [{**vote, "rank": rank} for rank, vote in enumerate(votes) if vote]
            found = min(faults, key=lambda vote: not vote["of_loss"], default=None)  # a loss is why a sum of ranks is bad
            self.broadcast({"fault": found})
        if found is not None:
            error = NotFinite(f"{self.parts[found['rank']].text()}: {found['what']}", of_loss=found["of_loss"])
            error.op = found["op"]
            raise error

    def gather(self, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Bring the values of a step to process 0: a list, by process, of what the others gave. Elsewhere it is empty."""
        if self.rank:
            self.send_message(0, {**own, "report": self.report()})
            return []
        found = [self.receive_message(peer) for peer in self.others]
        self.reports = [self.report(), *(each["report"] for each in found)]
        return found


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)
