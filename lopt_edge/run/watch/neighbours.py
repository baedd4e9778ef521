"""Other programs on a GPU, while a run trains: whether they leave what the plan still needs.

A budget bounds this process alone, and what others hold was counted when the run began. What they take afterwards shows
when memory is refused, perhaps hours later, at the longest batch. So once a step the driver is asked what is free (some
microseconds, while the host would wait anyway); too little is said once, with what may be done. If memory is refused then,
the run goes on with a smaller plan, or stops with the last finished step saved (training/run.py): nothing is lost.

Where the device is RAM, that is the system's matter (planning/budgets.py).
"""

from __future__ import annotations

from collections.abc import Callable

from lopt_edge.run.devices.interface import Device
from lopt_edge.units import format_bytes


class Neighbours:
    """The watch. `need_bytes` are the plan's on the device, a driver's `context_bytes` included; `tell` gets the
    sentence."""

    def __init__(self, device: Device, *, need_bytes: int, context_bytes: int, tell: Callable[[str], None]) -> None:
        self.device, self.need_bytes, self.context_bytes, self.tell = device, need_bytes, context_bytes, tell
        self.is_told = False

    def look(self) -> None:
        """Ask the driver, and say once if what is free is less than what the plan may still take."""
        if self.is_told:
            return
        free, taken = self.device.free_bytes(), self.device.taken_bytes() + self.context_bytes
        if free + taken >= self.need_bytes:
            return
        self.is_told = True
        self.tell(
            f"other programs have taken memory of {self.device.name()} since the run began: {format_bytes(free)} are free, "
            f"and the longest batch may still take {format_bytes(self.need_bytes - taken)}; close them (see "
            f"{self.device.kind.watcher}), else a smaller plan takes over where memory is refused"
        )
