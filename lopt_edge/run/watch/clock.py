"""The seconds that a run takes, phase by phase: loading, quantising, training, saving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class PhaseClock:
    """A clock of the phases of a run (load, quantise, train, save, ...); repeated entries of a phase add up.

    `hear` is called with the name when a phase begins, and with an empty one when it ends.
    """

    def __init__(self, hear: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self._hear = hear

    def go_on_from(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds by phase that an earlier part of the run took."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose seconds are added to the phase of this name."""
        start = time.perf_counter()
        self._hear(name)
        try:
            yield
        finally:
            self._hear("")
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
