"""The device a run computes on: which one and in which dtype, with the reason for each.

The rule: no other file names torch's module for a kind of device, or asks which kind it has before it, but the kind's own
(run/devices). `device_of` gives the class of a torch device; what differs without torch (sizes of tiles, what counts as
device memory) is a field of its `kind` (plan/facts/device_kinds.py). A further kind is one more class there, named in
`CLASSES`, and one more row. A class decides nothing of a run but its dtype, and keeps no state.

What is chosen comes with its reason. The choice depends on the machine's features alone, never on a timing, so that the
same machine always chooses the same and a resumed run computes as it did before.
"""

from __future__ import annotations

import torch

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.device_kinds import AUTO, CPU, CUDA, DEVICE_TYPES, MPS, XPU, in_words, kind_of
from lopt_edge.run.devices.cuda import Cuda
from lopt_edge.run.devices.host import Host
from lopt_edge.run.devices.interface import Device
from lopt_edge.run.devices.mps import Mps
from lopt_edge.run.devices.xpu import Xpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES: dict[str, type[Device]] = {  # in the order in which `auto` looks for one
    CUDA.name: Cuda, XPU.name: Xpu, MPS.name: Mps, CPU.name: Host,
}  # fmt: skip


def device_of(device: torch.device) -> Device:
    """The `Device` that stands for a torch device."""
    return CLASSES[device.type](device)


def accelerators() -> tuple[Device, ...]:
    """All devices of this machine but the CPU."""
    return tuple(one for cls in CLASSES.values() if not cls.kind.computes_on_cores for one in cls.found())


def unused_accelerator() -> str | None:
    """The kind of accelerator that torch finds here and no run can use (Huawei's npu, ...), by torch's name."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type in CLASSES else found.type


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which losses are added up on a device: float64 where it has that."""
    return torch.float64 if device_of(device).kind.has_float64 else torch.float32


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
        if not cls.kind.computes_on_cores:
            untried = f", untried as yet: {CPU.name} is what was measured" if cls.kind.is_untried else ""
            return device, cls(device).name() + untried
        others = [other.kind.title for other in CLASSES.values() if other is not cls]
        unused = "" if (found := unused_accelerator()) is None else f"; {found} is not supported yet"
        return device, "asked for" if name == cls.kind.name else f"no {in_words(*others)} device found{unused}"
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
