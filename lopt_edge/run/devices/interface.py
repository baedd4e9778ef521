"""What a kind of device must offer: the protocol `Device`, and the small things that it hands out.

The rule: whoever computes, moves or measures asks a `Device` (run/device.py gives it) and never torch's module for a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lopt_edge.plan.facts.device_kinds import DeviceKind


class SideStream(Protocol):
    """A stream of copies beside the computing one. A mark is a point of either stream that has yet to be passed."""

    def record_event(self) -> Any:
        """Put a mark on this stream and return it: `query()` says whether the stream is past it, `synchronize()` waits."""

    def mark_compute(self) -> Any:
        """Put a mark on the computing stream and return it."""

    def after(self, mark: Any) -> AbstractContextManager[Any]:
        """A context: what is begun inside runs on this stream, once `mark` (None: no mark) is passed."""

    def hold_compute(self, mark: Any) -> None:
        """Let the computing stream wait for a mark of this stream; this thread goes on."""

    def synchronize(self) -> None:
        """Wait in this thread for all that was begun on this stream."""


class Counters(Protocol):
    """Counters of the bytes of live tensors of one device."""

    @property
    def live_bytes(self) -> int:
        """The bytes of the tensors that are alive now."""

    @property
    def peak_bytes(self) -> int:
        """The most that `live_bytes` was since the last `start_peak`."""

    def start_peak(self) -> None:
        """Let `peak_bytes` begin anew, at what is alive now."""


@dataclass(frozen=True)
class Wall:
    """What refuses memory beyond a budget. `renew` makes it count anew, after memory was given back."""

    lift: Callable[[], None]
    renew: Callable[[], None] = lambda: None


class Device(Protocol):
    """One device of one kind. All byte counts are of the device tier; `kind.counts_process` says what that counts."""

    kind: DeviceKind
    device: torch.device

    def __init__(self, device: torch.device) -> None: ...

    @classmethod
    def found(cls) -> tuple[Device, ...]:
        """The devices of this kind that torch can use on this machine."""

    @classmethod
    def current(cls) -> torch.device | None:
        """The torch device of this kind that a run gets if it names none; None where torch finds none."""

    # what it is

    def name(self) -> str:
        """The name that the device's maker gave it."""

    def capability(self) -> str | None:
        """The version of the device's instructions, as "8.9"; None for a kind that has no such number."""

    def standing(self) -> str:
        """What is known of runs on such a device, in words: measured, proved otherwise, or untried."""

    def auto_dtype(self) -> tuple[torch.dtype, str]:
        """The compute dtype that the device is best at, and the reason in words."""

    def check_dtype(self, name: str) -> None:
        """Raise InputError if training in the dtype of this name is no good on this kind of device."""

    def dtype_names(self) -> tuple[str, ...]:
        """The names of the compute dtypes that a run may use on this device."""

    def attention_kernel(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """The fused kernel (plan/costs/tiles.py) that attention without a mask is to call; None: torch shall choose."""

    def made_deterministic(self) -> AbstractContextManager[None]:
        """A context inside which the device's kernels give the same bits each time."""

    def made_current(self) -> AbstractContextManager[Any]:
        """A context inside which kernels of other libraries, too, run on this device."""

    def for_process(self, number: int) -> torch.device:
        """The torch device of this machine's process `number` (from 0) of a pipeline, made the process' current one."""

    # memory

    def total_bytes(self) -> int:
        """The size of the device's memory."""

    def free_bytes(self) -> int:
        """The bytes that a run which begins now may take; on the CPU with what its process has already."""

    def taken_bytes(self) -> int:
        """The bytes that this process takes now, without a driver's context."""

    def peak_bytes(self) -> int:
        """The most that `taken_bytes` ever was."""

    def counters(self) -> Counters | None:
        """The allocator's counters; None where no allocator counts tensors."""

    def allocator(self) -> str | None:
        """How the allocator takes memory, and why, in words; None where there is nothing to say."""

    def settle_allocator(self) -> None:
        """Let the allocator take memory in the way that `allocator` says. Called before a run's first tensor."""

    def limit(self, n_bytes: int, *, context_bytes: int) -> Wall:
        """Let the system refuse what is beyond `n_bytes`. Raises RunError if the process takes more already."""

    # movement

    def side_stream(self) -> SideStream | None:
        """A new stream for copies; None on a device whose copies need none."""

    def pin(self, block: Tensor) -> bool:
        """Lock a block of host memory in its place, so that the device reads it itself; False where that is refused."""

    def unpin(self, block: Tensor) -> None:
        """Undo `pin` of this block."""

    def synchronize(self) -> None:
        """Wait in this thread for all that was begun on the device."""

    # random numbers

    def random_state(self) -> Tensor:
        """The state of torch's generator for this device, as bytes (uint8, one dimension)."""

    def set_random_state(self, state: Tensor) -> None:
        """Put back what `random_state` gave."""
