"""All that depends on the device a run computes on: one small interface, and one class for each kind of device.

The rule: no other file names torch's module for a kind of device, or asks which kind it has before it. `device_of` gives
the class of a torch device; what differs without torch (sizes of tiles, what counts as device memory) is a field of its
`kind` (plan/facts/device_kinds.py). A further kind (Intel's `xpu`, say) is one more class here, named in `CLASSES`, and one
more row there. A class decides nothing of a run but its dtype, and keeps no state.

What is chosen, device and dtype, comes with its reason. The choice depends on the machine's features alone, never on a
timing, so that the same machine always chooses the same and a resumed run computes as it did before.

Measured on 2 cores of an AMD EPYC with avx512_bf16: one 512 x 896 x 4864 product runs at 415 GFLOP/s in bfloat16 and at
152 in float32. But oneDNN compiles and keeps a bfloat16 kernel for every new number of tokens: ten steps on sequences of
many lengths took 841 MiB against 469 in float32, at half the speed. Without bf16 instructions bfloat16 is three times
slower than float32 (42 against 126 GFLOP/s). So `auto` is float32 on every CPU but those with AMX, and bfloat16 is there
to be asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lopt_edge.errors import InputError, RunError
from lopt_edge.plan.costs.tiles import EFFICIENT, FLASH, FLASH_WIDEST
from lopt_edge.plan.facts.device_kinds import AUTO, CPU, CUDA, DEVICE_TYPES, DeviceKind, in_words, kind_of
from lopt_edge.system.memory import available_bytes, cap_data_bytes, peak_rss_bytes, ram_bytes, resident_bytes
from lopt_edge.system.processor import processor_name
from lopt_edge.units import format_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    def auto_dtype(self) -> tuple[torch.dtype, str]:
        """The compute dtype that the device is best at, and the reason in words."""

    def check_dtype(self, name: str) -> None:
        """Raise InputError if training in the dtype of this name is no good on this kind of device."""

    def dtype_names(self) -> tuple[str, ...]:
        """The names of the compute dtypes that a run may use on this device."""

    def attention_kernel(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """The fused kernel (plan/costs/tiles.py) that attention without a mask is to call; None: torch shall choose."""

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


class Host:
    """The CPU. Its memory is RAM: no tier lies between it and the disk, and tensors are counted with all of the process."""

    kind = CPU

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def found(cls) -> tuple[Host, ...]:
        return (cls(cls.current()),)

    @classmethod
    def current(cls) -> torch.device:
        return torch.device(CPU.name)

    def name(self) -> str:
        return processor_name()

    def capability(self) -> str | None:
        return None

    def auto_dtype(self) -> tuple[torch.dtype, str]:
        if torch.cpu.get_capabilities().get("amx_bf16"):
            return torch.bfloat16, "the CPU has bfloat16 matrix units (AMX)"
        return torch.float32, "the steadiest in memory on a CPU without AMX"

    def check_dtype(self, name: str) -> None:
        if name == "float16":
            what, fix = "float16 overflows in training and is slow on a CPU", "use auto, bfloat16 or float32"
            raise InputError(what, where="compute_dtype", fix=fix)

    def dtype_names(self) -> tuple[str, ...]:
        return ("float32", "bfloat16")

    def attention_kernel(self, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def made_current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def for_process(self, number: int) -> torch.device:
        return self.device

    def total_bytes(self) -> int:
        return ram_bytes()

    def free_bytes(self) -> int:
        return available_bytes() + resident_bytes()

    def taken_bytes(self) -> int:
        return resident_bytes()

    def peak_bytes(self) -> int:
        return peak_rss_bytes()

    def counters(self) -> Counters | None:
        return None

    def limit(self, n_bytes: int, *, context_bytes: int) -> Wall:
        left = n_bytes - resident_bytes()
        if left <= 0:
            what = f"the process already takes {format_bytes(resident_bytes())} of its {format_bytes(n_bytes)}"
            raise RunError(what, where="device_memory", fix="raise the budget")
        cap = cap_data_bytes(left)
        return Wall(cap.lift, lambda: cap.renew(n_bytes - resident_bytes()))

    def side_stream(self) -> SideStream | None:
        return None

    def pin(self, block: Tensor) -> bool:
        return False

    def unpin(self, block: Tensor) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)


class Cuda:
    """An NVIDIA GPU (or what torch drives as one). Its memory is what torch's allocator reserved, beside the context."""

    kind = CUDA

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def found(cls) -> tuple[Cuda, ...]:
        return tuple(cls(torch.device(CUDA.name, index)) for index in range(torch.cuda.device_count()))

    @classmethod
    def current(cls) -> torch.device | None:
        return torch.device(CUDA.name, torch.cuda.current_device()) if torch.cuda.is_available() else None

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def capability(self) -> str | None:
        facts = torch.cuda.get_device_properties(self.device)
        return f"{facts.major}.{facts.minor}"

    def auto_dtype(self) -> tuple[torch.dtype, str]:
        if self._has_bfloat16():
            return torch.bfloat16, "the GPU has bfloat16 matrix units"
        return torch.float16, "the GPU has no bfloat16 matrix units; gradients are scaled"

    def check_dtype(self, name: str) -> None:
        pass

    def dtype_names(self) -> tuple[str, ...]:
        return ("float32", "float16", *(["bfloat16"] if self._has_bfloat16() else []))

    def attention_kernel(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """Flash attention wants half precision and sm80. Both kernels want heads of whole 16 bytes (AMD's are untested)."""
        if torch.version.hip or head_dim * dtype.itemsize % 16:
            return None
        flash = dtype.itemsize == 2 and head_dim <= FLASH_WIDEST and self._has_bfloat16()
        return FLASH if flash else EFFICIENT

    def _has_bfloat16(self) -> bool:
        with self.made_current():
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def made_current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def for_process(self, number: int) -> torch.device:
        device = torch.device(CUDA.name, number % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def total_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def taken_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def counters(self) -> Counters | None:
        return _CudaCounters(self.device)

    def limit(self, n_bytes: int, *, context_bytes: int) -> Wall:
        """Bound torch's allocator by `n_bytes` less `context_bytes`, which the driver takes beside it."""
        total = torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, n_bytes - context_bytes) / total), self.device)
        return Wall(lambda: torch.cuda.set_per_process_memory_fraction(1.0, self.device))

    def side_stream(self) -> SideStream | None:
        return _CudaStream(self.device)

    def pin(self, block: Tensor) -> bool:
        with self.made_current():  # a worker's current device is the first one, whose driver context would cost memory
            if int(_cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0:
                return True
            with suppress(RuntimeError):  # the refusal stays behind, and the next launch raises it: let that be this one
                torch.ones(1, device=self.device)
        return False

    def unpin(self, block: Tensor) -> None:
        with self.made_current():
            _cudart().cudaHostUnregister(block.data_ptr())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)


def _cudart() -> Any:
    """torch's binding of the CUDA runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # it has no types


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own has no types

    def record_event(self) -> Any:
        return self.stream.record_event()

    def mark_compute(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def after(self, mark: Any) -> AbstractContextManager[Any]:
        if mark is not None:
            self.stream.wait_event(mark)
        return torch.cuda.stream(self.stream)

    def hold_compute(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def synchronize(self) -> None:
        self.stream.synchronize()


class _CudaCounters:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def live_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


CLASSES: dict[str, type[Device]] = {CUDA.name: Cuda, CPU.name: Host}  # the order in which `auto` looks for one


def device_of(device: torch.device) -> Device:
    """The `Device` that stands for a torch device."""
    return CLASSES[device.type](device)


def accelerators() -> tuple[Device, ...]:
    """All devices of this machine but the CPU."""
    return tuple(one for cls in CLASSES.values() if cls.kind.host_is_below for one in cls.found())


def random_sources(device: torch.device) -> tuple[Device, ...]:
    """The devices whose random numbers a run on `device` draws: the CPU, then the device itself if it is another one."""
    own, host = device_of(device), Host(Host.current())
    return (host,) if own.kind is host.kind else (host, own)


def torch_build() -> str | None:
    """The CUDA version that torch was built for, if any."""
    return torch.version.cuda


# the choices -----------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device for auto or the name of a kind, and the reason in words. Raises InputError if there is none."""
    if name not in (AUTO, *DEVICE_TYPES):
        raise InputError(f"{name!r} is unknown", where="device", fix=f"choose {in_words(AUTO, *DEVICE_TYPES)}")
    for cls in CLASSES.values():
        if name not in (AUTO, cls.kind.name) or (device := cls.current()) is None:
            continue
        if cls.kind.host_is_below:
            return device, cls(device).name()
        others = [other.kind.title for other in CLASSES.values() if other is not cls]
        return device, "asked for" if name == cls.kind.name else f"no {in_words(*others)} device found"
    what = f"this machine offers no {kind_of(name).title} device to torch"
    raise InputError(what, where="device", fix=f"use --device {CPU.name}, or see lopt-edge doctor")


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype for auto or a name of `DTYPES`, and the reason in words.

    Raises InputError for a name that is unknown, or a dtype in which training is no good on this device.
    """
    if name not in (AUTO, *DTYPES):
        raise InputError(f"{name!r} is unknown", where="compute_dtype", fix=f"choose auto, {', '.join(DTYPES)}")
    own = device_of(device)
    own.check_dtype(name)
    return own.auto_dtype() if name == AUTO else (DTYPES[name], "asked for")


def peak_device_bytes(device: torch.device) -> int:
    """The device tier's peak: what the allocator reserved, or the resident set of a process whose device is the CPU."""
    return device_of(device).peak_bytes()
