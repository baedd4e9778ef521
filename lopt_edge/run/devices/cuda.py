"""NVIDIA's GPUs, and AMD's, which torch drives under the same name (ROCm).

torch's allocator takes memory in segments. Of fixed ones a run over batches of many lengths leaves pieces that fit nothing;
segments that grow (`expandable_segments`) do not. So they are asked for before the first tensor, unless the user has set
the allocator by the environment. On WSL they are left alone: its driver fails at the calls behind them (pytorch issue
192330, "CUDA driver error: unknown error" at the first tensor), Windows has none, and on AMD nobody has tried.

Two runs on a GPU agree within rounding: flash attention's backward adds up the gradient of the queries by atomic
operations. It has a deterministic form, which keeps a sum for every multiprocessor: half a gigabyte at 8,192 tokens of an
8B whatever heads run at a time. The memory-efficient kernel needs nothing more (aten's attention_backward.cu: one split of
the keys), so where the same bits are asked for attention is its.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from lopt_edge.plan.costs.tiles import EFFICIENT, FLASH, FLASH_WIDEST
from lopt_edge.plan.facts.device_kinds import CUDA
from lopt_edge.run.devices.driven import DrivenCounters, DrivenStream
from lopt_edge.run.devices.interface import Counters, SideStream, Wall
from lopt_edge.system.memory import is_wsl

CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with others cuBLAS does not promise the same bits
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def growing_segments() -> tuple[bool, str]:
    """Whether a run asks for segments that grow, and what holds, in words."""
    for name in ALLOCATOR_VARIABLES:
        if os.environ.get(name):
            return False, f"as {name} says: {os.environ[name]}"
    if sys.platform != "linux" or is_wsl():
        return (
            False,
            f"fixed segments, since {'the driver of WSL' if is_wsl() else 'this system'} has trouble with growing ones",
        )
    if torch.version.hip:
        return False, "fixed segments: growing ones are untried on AMD"
    return True, "segments that grow (expandable_segments)"


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

    def standing(self) -> str:
        if torch.version.hip:
            return "untried: AMD's cards take NVIDIA's path here, and nobody has reported one (doctor --prove looks)"
        return "no run has met a GPU yet; the path is proved on a card in name (doctor --prove looks at this one)"

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
        half = dtype.itemsize == 2 and not torch.are_deterministic_algorithms_enabled()
        flash = half and head_dim <= FLASH_WIDEST and self._has_bfloat16()
        return FLASH if flash else EFFICIENT

    def _has_bfloat16(self) -> bool:
        with self.made_current():
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    @contextmanager
    def made_deterministic(self) -> Iterator[None]:
        """torch raises where a kernel has no such form. What is not written to is not filled: nobody reads it."""
        empties: Any = torch.utils.deterministic
        filled, asked = empties.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
        os.environ.setdefault(*CUBLAS_WORKSPACE)
        empties.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(asked)
            empties.fill_uninitialized_memory = filled

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
        return DrivenCounters(torch.cuda, self.device)

    def allocator(self) -> str | None:
        return growing_segments()[1]

    def settle_allocator(self) -> None:
        if growing_segments()[0]:
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")

    def limit(self, n_bytes: int, *, context_bytes: int) -> Wall:
        """Bound torch's allocator by `n_bytes` less `context_bytes`, which the driver takes beside it."""
        total = torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, n_bytes - context_bytes) / total), self.device)
        return Wall(lambda: torch.cuda.set_per_process_memory_fraction(1.0, self.device))

    def side_stream(self) -> SideStream | None:
        return DrivenStream(torch.cuda, self.device)

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
