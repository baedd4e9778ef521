"""The batches of the steps: on a GPU the next step's are made while the device still computes this one.

A step ends with the one wait of its host, for the norms (run/step/optim.py). When all that the device has to do before it
was asked for, the host makes the next step's token ids and positions, and reads the rows of its first micro-batch's tokens
into pinned memory: so the next step begins with copies that nobody waits for, not with thousands of small reads while the
device has nothing to do. On the device itself nothing lies early: a step's bytes are as planned.

It changes no number and no order. Where preferences are compared with a reference the model has a say in a batch, and on a
CPU there is nobody to work beside: there each step's batches are made when it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch

from lopt_edge.data import Window
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch, sent
from lopt_edge.training.prepare.inputs import Inputs

HOST = torch.device("cpu")


@dataclass(eq=False)
class Ahead:
    """The maker of steps' batches. `coming` is a window that was drawn early, with its batches on the host."""

    inputs: Inputs
    model: Model
    drawn: Iterator[Window] = field(default_factory=lambda: iter(()))
    coming: tuple[Window, list[Batch]] | None = None
    ready: tuple[Window, list[Batch]] | None = None  # of the step that begins

    def windows(self, *, first: int) -> Iterator[Window]:
        """Yield the windows of the run's steps after `first` finished ones, in order."""
        self.drawn = islice(self.inputs.windows(first=first), self.inputs.n_steps - first)
        while True:
            self.ready, self.coming = self.coming, None
            window = self.ready[0] if self.ready is not None else next(self.drawn, None)
            if window is None:
                return
            yield window

    def make_ready(self) -> None:
        """Make the next step's batches, unless they are made already or no step follows."""
        if self.coming is not None or (window := next(self.drawn, None)) is None:
            return
        batches = [self.inputs.batch(self.inputs.train, indices, device=HOST) for indices in window]
        self.coming = (window, batches)
        self.model.embedding.read_ahead(batches[0].ids_BT.reshape(-1))

    def batches(self, window: Window) -> list[Batch]:
        """The batches of a window, on the device."""
        stage, ready = self.model.mover.stage, self.ready
        if stage is None or ready is None or ready[0] is not window:
            return [self.inputs.batch(self.inputs.train, indices, stage=stage) for indices in window]
        self.ready = None
        return [sent(batch, stage) for batch in ready[1]]
