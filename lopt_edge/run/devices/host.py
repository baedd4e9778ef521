"""The CPU as a device: its memory is RAM, its tensors are counted with all of the process, nothing moves beside it.

Measured on 2 cores of an AMD EPYC with avx512_bf16: one 512 x 896 x 4864 product runs at 415 GFLOP/s in bfloat16 and at
152 in float32. But oneDNN compiles and keeps a bfloat16 kernel for every new number of tokens: ten steps on sequences of
many lengths took 841 MiB against 469 in float32, at half the speed. Without bf16 instructions bfloat16 is three times
slower than float32 (42 against 126 GFLOP/s). So `auto` is float32 on every CPU but those with AMX, and bfloat16 is there
to be asked for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lopt_edge.errors import InputError, RunError
from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.run.devices.interface import Counters, SideStream, Wall
from lopt_edge.system.memory import available_bytes, cap_data_bytes, peak_rss_bytes, ram_bytes, resident_bytes
from lopt_edge.system.processor import processor_name
from lopt_edge.units import format_bytes


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

    def standing(self) -> str:
        return "measured: every law and every bench runs here"

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

    def made_deterministic(self) -> AbstractContextManager[None]:
        """Nothing: with as many threads the same bits come anyway."""
        return nullcontext()

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

    def allocator(self) -> str | None:
        return None

    def settle_allocator(self) -> None:
        """Nothing: a heap is system/allocator.py's matter, since there is one where no torch is loaded, too."""

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
