"""AdamW over parameter groups: one group a layer's adapters or a segment's aux head; clipping per segment or over all.

Each group's values, gradients and moments are flat fp32 tensors (parameters are views of them), so that a group moves
between tiers as one piece and the heap is not cut up by small tensors that come and go. torch's fused AdamW runs on the
flat tensors; it is elementwise, so grouping changes no bit. `adamw8bit` keeps both moments in bitsandbytes' dynamic 8-bit
form (blocks of 256, arXiv 2110.02861), unpacked to fp32 for the update: a quarter of the bytes, not the same bits.

The rules: nothing is updated unless every gradient of the step is finite (norms are taken as gradients become complete, and
checked before the first update; with early STEPs, before each group's), so that one bad batch leaves no trace. A parameter
without gradient would be skipped, one with a zero gradient is not: momentum and decay still move it; here every trained
parameter always has one. When a group is updated, where its states lie and which learning rate it gets is the plan's and
the caller's business.

Where moments are paged, an update reads and writes files and so may fail between two groups. Before a group's update its
values go down to the journal, in a page file of its own, so that one damaged file never costs the last finished step:
- the file of the states is damaged: `roll_back` undoes this step's updates from the journal
- the journal is damaged after updates of this step: they cannot be undone, but nothing else is missing; so the step goes
  on to its end without a journal, and the fault is raised at the beginning of the next one
Both damaged within one step is beyond it: `roll_back` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lopt_edge.errors import LoptError, NotFinite, RunError
from lopt_edge.plan.schedule.ops import GroupName
from lopt_edge.run.device import sum_dtype
from lopt_edge.run.step.moments import Moments, make_moments
from lopt_edge.run.step.step_state import present
from lopt_edge.run.tiers.moves import Mover, OffloadedTensor

BETAS, EPSILON = (0.9, 0.999), 1e-8
ALIGNMENT = 16  # elements: each group begins at 64 bytes, so that vector loops cut it alike wherever it lies


def learning_rate(
    step: int, *, n_steps: int, peak: float, schedule: str, warmup_ratio: float, cycles: int = 1, lowest: float = 0.0
) -> float:
    """The learning rate of step `step` (from 1): linear warm-up over ceil(ratio x steps), then `schedule`.

    The schedule is "constant", "linear" or cosine, which fall to `lowest`; a cosine begins again at the peak in each of its
    `cycles` (SGDR, arXiv 1608.03983, without its shrinking peaks).
    """
    n_warmup = math.ceil(warmup_ratio * n_steps)
    if step <= n_warmup:
        return peak * step / n_warmup
    if schedule == "constant":
        return peak
    progress = (step - 1 - n_warmup) / max(1, n_steps - n_warmup)
    if schedule == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + math.cos(math.pi * (progress * cycles % 1.0 if cycles > 1 else progress)))
    return lowest + (peak - lowest) * share if lowest else peak * share  # the same bits as ever without a lowest rate


@dataclass(eq=False)
class Group:
    """A parameter group. `values` is flat fp32; `gradient` and `moments` are offloaded tensors (None: not made yet)."""

    name: GroupName
    segment: int  # in the step under way
    parameters: list[nn.Parameter]
    values: Tensor
    gradient: OffloadedTensor | None = None
    moments: OffloadedTensor | None = None
    journal: OffloadedTensor | None = None  # the values before this step's update, below, where the moments are paged too
    steps: int = 0
    updated: bool = False  # in the step under way
    square_norm: Tensor | None = None

    @property
    def n_elements(self) -> int:
        """The number of the group's values."""
        return self.values.numel()


class SegmentOptimizer:
    """An AdamW over all groups. `groups` gives each group's parameters. `clip` 0: no clipping."""

    def __init__(
        self,
        groups: Mapping[GroupName, Sequence[nn.Parameter]],
        *,
        mover: Mover,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        clip_scope: str = "segment",
        optimizer: str = "adamw",
    ) -> None:
        self.clip, self.clip_scope, self.weight_decay, self.mover = clip, clip_scope, weight_decay, mover
        self.moments: Moments = make_moments(optimizer, mover.device)
        self.groups: dict[GroupName, Group] = {}
        starts, n_elements = {}, 0
        for name, parameters in groups.items():
            starts[name] = n_elements
            n_elements += -(-sum(p.numel() for p in parameters) // ALIGNMENT) * ALIGNMENT
        self._values = torch.empty(n_elements, dtype=torch.float32, device=mover.device)
        self._gradients: Tensor | None = None  # one block for all groups, where gradients lie on the device
        self._starts = starts
        self._open_from = 0  # elements: where the gradients' block begins, once early groups are closed
        for name, parameters in groups.items():
            self.groups[name] = self._make_group(name, list(parameters))
        self.norms: dict[int, float] = {}
        self.checked = False
        self.loss_scale = 1.0
        self.journal_fault: LoptError | None = None  # of the step under way, which goes on to its end
        self.meanwhile: Sequence[Callable[[], None]] = ()  # what the host does before it waits for a GPU's norms

    def _make_group(self, name: GroupName, parameters: list[nn.Parameter]) -> Group:
        """Move the parameters' values into the flat block."""
        start = position = self._starts[name]
        for parameter in parameters:
            view = self._values[position : position + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            position += parameter.numel()
        return Group(name, 0, parameters, self._values[start:position])

    # gradients -------------------------------------------------------------------------------------------------------

    def begin_step(self, *, segments: Mapping[GroupName, int], loss_scale: float = 1.0, closed: int = 0) -> None:
        """Begin a step. `segments` gives each group's segment, for the clip norms; a group without one is not updated.

        Of the layers before `closed`, which train no more in this run, moments and room for gradients are let go.

        Raises RunError if the last step's undo copies were lost: it is whole, but the next one could not be undone.
        """
        if self.journal_fault is not None:
            fault, self.journal_fault = self.journal_fault, None
            raise RunError(f"the last step's undo copies could not be written: {fault}")
        if closed:
            self._close(closed)
        self.norms, self.checked, self.loss_scale = {}, False, loss_scale
        for name, group in self.groups.items():
            group.square_norm, group.updated, group.segment = None, False, segments.get(name, -1)

    def _close(self, closed: int) -> None:
        open_from = min(start for (unit, target), start in self._starts.items() if unit != "layer" or target >= closed)
        if open_from == self._open_from:
            return
        self._open_from, self._gradients = open_from, None
        for (unit, target), group in self.groups.items():
            if unit == "layer" and target < closed:
                for offloaded in (group.moments, group.journal):
                    if offloaded is not None:
                        self.mover.free(offloaded)
                group.moments = group.journal = None

    def accept_gradients(self, name: GroupName, *, own_block: bool) -> None:
        """Make the group ready to add gradients to: zeros at first, later what is there already.

        `own_block` puts them in a tensor of their own, which can move; else they lie in the block of all groups.
        """
        group = self.groups[name]
        if group.gradient is not None:
            group.gradient.here()
            return
        if own_block:
            flat = torch.zeros(group.n_elements, dtype=torch.float32, device=self.mover.device)
        else:
            if self._gradients is None:
                self._gradients = torch.empty_like(self._values[self._open_from :])
            flat = self._gradients[self._starts[name] - self._open_from :][: group.n_elements].zero_()
        group.gradient = OffloadedTensor(flat)
        self._attach(group)

    def _attach(self, group: Group) -> None:
        flat, position = present(group.gradient).here(), 0
        for parameter in group.parameters:
            parameter.grad = flat[position : position + parameter.numel()].view(parameter.shape)
            position += parameter.numel()

    def store_gradients(self, name: GroupName, tier: str) -> None:
        """Begin to move a group's gradients to `tier`."""
        group = self.groups[name]
        for parameter in group.parameters:
            parameter.grad = None
        self.mover.down(present(group.gradient), tier)

    def load_gradients(self, name: GroupName) -> None:
        """Begin to bring a group's gradients back to the device."""
        self.mover.up(present(self.groups[name].gradient))

    def wait_gradients(self, name: GroupName) -> None:
        """End the movement of a group's gradients. Raises RunError if it failed."""
        group = self.groups[name]
        gradient = present(group.gradient)
        self.mover.wait(gradient)
        if gradient.tensor is not None:
            self._attach(group)

    def complete_gradients(self, name: GroupName) -> None:
        """Take the norm of a group's gradients, which are complete for this step; `check_finite` looks at it later."""
        group = self.groups[name]
        group.square_norm = present(group.gradient).here().square().sum()

    # states ----------------------------------------------------------------------------------------------------------

    def store_states(self, name: GroupName, tier: str) -> None:
        """Begin to move a group's moments to `tier`."""
        self.mover.down(present(self.groups[name].moments), tier)

    def load_states(self, name: GroupName) -> None:
        """Begin to bring a group's moments up, and its values before the update down, for `roll_back`."""
        group = self.groups[name]
        if group.moments is None:  # before the first step there is nothing below yet
            group.moments = OffloadedTensor(self.moments.zeros(group.n_elements))
        else:
            self.mover.up(group.moments)
        group.journal = group.journal or OffloadedTensor(None, file=self.mover.journal_file)
        group.journal.tensor = group.values
        self.mover.down(group.journal, "disk" if self.mover.page_file else "host")

    def wait_states(self, name: GroupName) -> None:
        """End the movements of a group's moments and undo copy. Raises RunError if the step must not go on.

        A lost undo copy is raised at the next `begin_step` instead, if a group of this step is updated already.
        """
        group = self.groups[name]
        self.mover.wait(present(group.moments))
        if group.journal is None:
            return
        try:
            self.mover.wait(group.journal)
        except LoptError as error:
            self.mover.free(group.journal)  # what an earlier step left there must never be taken for this one's values
            if not any(other.updated for other in self.groups.values()):
                raise
            self.journal_fault = self.journal_fault or error

    def roll_back(self) -> bool:
        """Undo the updates of this step, after a fault between two of them. Returns False if that was not possible.

        Where moments are paged an update reads files, so it may fail half way; elsewhere it cannot, and nothing is undone.
        """
        for group in self.groups.values():
            if not group.updated:
                continue
            if group.journal is None or not group.journal.is_below:
                return False
            try:
                self.mover.up(group.journal)
                self.mover.wait(group.journal)
            except LoptError:
                return False
            group.values.copy_(group.journal.here())
            group.journal.tensor, group.steps, group.updated = None, group.steps - 1, False
        return True

    # updates ---------------------------------------------------------------------------------------------------------

    def check_finite(
        self, beside: Sequence[Tensor] = (), *, told: Callable[[list[float]], None] = lambda values: None
    ) -> None:
        """Compute the norms of all segments whose gradients are complete. Raises NotFinite if one is infinite or NaN.

        `beside` are numbers that are read in the same wait, in the dtype of sums; `told` gets their values before a norm is
        looked at.
        """
        squares: dict[int, list[Tensor]] = {}
        for group in self.groups.values():
            if group.square_norm is not None:
                squares.setdefault(group.segment, []).append(group.square_norm)
        if not squares and not beside:
            return
        for work in self.meanwhile:
            work()
        dtype = sum_dtype(self.mover.device)
        numbers = [torch.stack(found).sum().to(dtype) for found in squares.values()]
        read = torch.stack([*numbers, *beside]).cpu().tolist()
        told(read[len(squares) :])
        sums = read[: len(squares)]  # one wait for a GPU
        self.norms = {segment: math.sqrt(value) / self.loss_scale for segment, value in zip(squares, sums, strict=True)}
        for segment, norm in self.norms.items():
            if not math.isfinite(norm):
                raise NotFinite(f"the gradient of segment {segment} is not finite; nothing was updated")

    def step(self, name: GroupName, *, lr: float, early: bool = False) -> None:
        """Clip the gradients of one group, update its values, free the gradients. Raises NotFinite before it updates.

        `early` says that other groups' gradients may still be missing.
        """
        if early or not self.checked:
            self.check_finite()
            self.checked = not early
        group = self.groups[name]
        gradient = present(group.gradient).here()
        factor = self._clip_factor(group.segment) / self.loss_scale  # a power of two: exact
        if factor != 1.0:
            gradient.mul_(factor)
        if group.moments is None:
            group.moments = OffloadedTensor(self.moments.zeros(group.n_elements))
        with self.moments.unpacked(group.moments.here(), group.n_elements) as (first, second):
            group.steps += 1
            group.updated = True
            adamw(
                [group.values],
                [gradient],
                [first],
                [second],
                [],
                [torch.tensor(float(group.steps - 1), device=gradient.device)],  # adamw counts up itself
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=lr,
                weight_decay=self.weight_decay,
                eps=EPSILON,
                maximize=False,
                fused=True,
            )
        self._drop(group)

    def _clip_factor(self, segment: int) -> float:
        if not self.clip:
            return 1.0
        norm = self.norms[segment]
        if self.clip_scope == "global":
            norm = math.sqrt(sum(value * value for value in self.norms.values()))
        return self.clip / (norm + 1e-6) if norm > self.clip else 1.0  # torch.nn.utils.clip_grad_norm_'s guard

    def _drop(self, group: Group) -> None:
        for parameter in group.parameters:
            parameter.grad = None
        if group.gradient is not None:
            self.mover.free(group.gradient)
            group.gradient = None

    def drop_gradients(self) -> None:
        """Let all gradients go and end all movements; for use after a fault."""
        for group in self.groups.values():
            self._drop(group)
            for offloaded in (group.moments, group.journal):
                if offloaded is not None:
                    self.mover.settle(offloaded)
            if group.journal is not None:  # paged moments: what counts is the copy below, if there is one yet
                group.journal.tensor = None
                if group.moments is not None and group.moments.is_below:
                    group.moments.tensor = None
                else:
                    group.moments = None

    @property
    def any_updated(self) -> bool:
        """Whether the step under way has updated a group already."""
        return any(group.updated for group in self.groups.values())

    # checkpoints -----------------------------------------------------------------------------------------------------

    def gradient_copy(self, name: GroupName) -> Tensor | None:
        """The group's accumulated gradient, flat on the CPU, wherever it lies now; None before its first."""
        offloaded = self.groups[name].gradient
        return None if offloaded is None else self.mover.look(offloaded).view(-1)

    def put_gradient(self, name: GroupName, flat: Tensor, *, own_block: bool) -> None:
        """Put back the gradient (flat) that a group had accumulated before a cut, on the device."""
        self.accept_gradients(name, own_block=own_block)
        present(self.groups[name].gradient).here().copy_(flat)

    def moments_copy(self, name: GroupName) -> Tensor | None:
        """The group's stored moments, on the CPU, wherever they lie now; None before its first update."""
        offloaded = self.groups[name].moments
        return None if offloaded is None else self.mover.look(offloaded)

    def put_state(self, name: GroupName, *, moments: Tensor | None, steps: int, tier: str) -> None:
        """Put back a checkpoint's moments and number of updates; the moments go to `tier`, where the plan has them."""
        group = self.groups[name]
        group.steps = steps
        if moments is None:
            return
        group.moments = OffloadedTensor(moments.to(self.mover.device))
        if tier != "device":
            self.mover.down(group.moments, tier)
            self.mover.wait(group.moments)

    def release(self) -> None:
        """Let gradients and moments go, on the device and below, since no update follows."""
        self.drop_gradients()
        self._gradients = None
        for group in self.groups.values():
            for offloaded in (group.moments, group.journal):
                if offloaded is not None:
                    self.mover.free(offloaded)
            group.moments = group.journal = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (category, tensor) of all that is kept on the device now."""
        yield "adapters", self._values
        if self._gradients is not None:
            yield "gradients", self._gradients
        for group in self.groups.values():
            for category, offloaded in (("gradients", group.gradient), ("optimizer", group.moments)):
                if offloaded is not None and offloaded.tensor is not None:
                    yield category, offloaded.tensor
