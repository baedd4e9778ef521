"""The other processes of a run as process 0 starts, meets and ends them: those of a pipeline, and ranks that share a step.

They are started here on this machine, or torchrun has started them; either way they find the run's facts at the meeting
place. The rules: when one is lost the error says which and why, as far as that can be known (what it left at the meeting
place, how it ended); none that was started here is left when process 0 leaves `started`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lopt_edge.errors import InputError, LoptError, PeerLost, RunError
from lopt_edge.training.pipeline.launch import SETUP, Children, ended, torchrun_rank

if TYPE_CHECKING:  # torch.distributed is for those who need it
    from collections.abc import Callable

    from lopt_edge.run.link import Link, Member

CAUSE_SECONDS = 5.0  # to find out why a process was lost


class Peers:
    """The processes of a run, as process 0 sees them. `whole` says of what they are, in messages; `are_done`: they know
    that the run is over, and end by themselves."""

    def __init__(
        self, store: Any, members: Sequence[Member], children: Children | None, *, timeout: timedelta, whole: str
    ) -> None:
        self.store, self.members, self.children, self.timeout, self.whole = store, members, children, timeout, whole
        self.are_done = False

    def meet(self, setup: dict[str, Any], *, report: Callable[[], dict[str, int]]) -> Link:
        """Leave the run's facts at the meeting place, and wait until all are there. Raises what `explained` gives."""
        from lopt_edge.run.link import Link

        self.store.set(SETUP, json.dumps(setup))
        alive = self.children.check if self.children is not None else lambda: None
        try:
            return Link(
                self.store,
                self.members,
                0,
                timeout=self.timeout,
                whole=self.whole,
                loopback=self.children is not None,
                alive=alive,
                report=report,
            )
        except PeerLost as error:
            raise self.explained(error) from None

    def explained(self, error: RunError) -> RunError:
        """The error to raise for this one: for a lost process with the reason, as far as it can be known.

        Raises InputError for a fault that a process found in its input.
        """
        if not isinstance(error, PeerLost):
            return error
        deadline = time.monotonic() + CAUSE_SECONDS
        codes: dict[int, int] = {}
        faults: dict[int, dict[str, Any]] = {}
        while time.monotonic() < deadline and not faults and not codes:
            time.sleep(0.1)
            codes = {} if self.children is None else self.children.exit_codes()
            faults = self._faults()
        for rank, fault in faults.items():
            text = f"{self.members[rank].text()}{self.whole} failed: {fault['text']}"
            if fault["exit_code"] == InputError.exit_code:
                raise InputError(text)
            return _lost(text)
        if codes:
            rank, code = min(codes.items(), key=lambda item: item[1])  # negative: killed; the others ended for want of it
            fix = "was memory short? (dmesg says)" if code < 0 else ""
            return _lost(f"{self.members[rank].text()}{self.whole} {ended(code)}", fix=fix)
        return _lost(str(error))

    def _faults(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        with suppress(RuntimeError, LoptError):  # the meeting place may be gone as well
            for member in self.members[1:]:
                if self.store.check([f"fault {member.rank}"]):
                    found[member.rank] = json.loads(self.store.get(f"fault {member.rank}"))
        return found


def _lost(what: str, *, fix: str = "") -> RunError:
    error = RunError(what, fix=fix)
    error.values_intact = False  # a part of them may be gone
    return error


@contextmanager
def started(members: Sequence[Member], *, follow: str, timeout: timedelta, whole: str) -> Iterator[Peers]:
    """The other processes, which run the code `follow` where torchrun has not started them; they are ended at the end."""
    from lopt_edge.run.link import host_store, torchrun_store

    children: Children | None = None
    peers: Peers | None = None
    try:
        if torchrun_rank() is None:
            here = host_store(len(members), timeout)
            children = Children(len(members), port=here.port, follow=follow)
            peers = Peers(here, members, children, timeout=timeout, whole=whole)
        else:
            peers = Peers(torchrun_store(timeout), members, None, timeout=timeout, whole=whole)
        yield peers
    finally:
        if children is not None:
            children.end(at_once=peers is None or not peers.are_done)
