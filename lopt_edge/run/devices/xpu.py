"""Intel's GPUs, which torch drives as `xpu`. No run has met one.

bitsandbytes 0.50.2 packs there (by Triton) and has a kernel that unpacks into a tensor of its own, but none that unpacks
into ours where its own library is loaded. So 4-bit weights are unpacked by our code (quant/nf4.py), in chunks. torch
registers no memory that exists already, so nothing is page-locked: the host tier is there, its copies hold the host up.
Many of these cards have no float64: sums that are kept in it elsewhere are fp32 (`sum_dtype` of run/device.py).

Attention is torch's own choice; what it takes beside its results is in no plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lopt_edge.plan.facts.device_kinds import XPU
from lopt_edge.run.devices.driven import DrivenCounters, DrivenStream
from lopt_edge.run.devices.interface import Counters, SideStream, Wall


class Xpu:
    """An Intel GPU. Its memory is what torch's allocator reserved, beside the driver's context."""

    kind = XPU

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def found(cls) -> tuple[Xpu, ...]:
        return tuple(cls(torch.device(XPU.name, index)) for index in range(torch.xpu.device_count()))

    @classmethod
    def current(cls) -> torch.device | None:
        return torch.device(XPU.name, torch.xpu.current_device()) if torch.xpu.is_available() else None

    def name(self) -> str:
        return str(torch.xpu.get_device_name(self.device))

    def capability(self) -> str | None:
        return None

    def standing(self) -> str:
        return "untried: no run has met an Intel GPU; its rules are tried on CPU tensors (doctor --prove looks at this one)"

    def auto_dtype(self) -> tuple[torch.dtype, str]:
        if self._has_bfloat16():
            return torch.bfloat16, "the GPU has bfloat16 matrix units"
        return torch.float16, "the GPU has no bfloat16 matrix units; gradients are scaled"

    def check_dtype(self, name: str) -> None:
        pass

    def dtype_names(self) -> tuple[str, ...]:
        return ("float32", "float16", *(["bfloat16"] if self._has_bfloat16() else []))

    def attention_kernel(self, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def _has_bfloat16(self) -> bool:
        with self.made_current():
            return bool(torch.xpu.is_bf16_supported(including_emulation=False))

    @contextmanager
    def made_deterministic(self) -> Iterator[None]:
        asked = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(asked)

    def made_current(self) -> AbstractContextManager[Any]:
        return torch.xpu.device(self.device)

    def for_process(self, number: int) -> torch.device:
        device = torch.device(XPU.name, number % torch.xpu.device_count())
        torch.xpu.set_device(device)
        return device

    def total_bytes(self) -> int:
        return int(torch.xpu.get_device_properties(self.device).total_memory)

    def free_bytes(self) -> int:
        return torch.xpu.mem_get_info(self.device)[0]

    def taken_bytes(self) -> int:
        return torch.xpu.memory_reserved(self.device)

    def peak_bytes(self) -> int:
        return torch.xpu.max_memory_reserved(self.device)

    def counters(self) -> Counters | None:
        return DrivenCounters(torch.xpu, self.device)

    def allocator(self) -> str | None:
        return None

    def settle_allocator(self) -> None:
        """Nothing: what torch's allocator does there is left as it is."""

    def limit(self, n_bytes: int, *, context_bytes: int) -> Wall:
        """Bound torch's allocator by `n_bytes` less `context_bytes`, which the driver takes beside it."""
        share = max(0, n_bytes - context_bytes) / self.total_bytes()
        torch.xpu.set_per_process_memory_fraction(min(1.0, share), self.device)
        return Wall(lambda: torch.xpu.set_per_process_memory_fraction(1.0, self.device))

    def side_stream(self) -> SideStream | None:
        return DrivenStream(torch.xpu, self.device)

    def pin(self, block: Tensor) -> bool:
        return False

    def unpin(self, block: Tensor) -> None:
        pass

    def synchronize(self) -> None:
        torch.xpu.synchronize(self.device)

    def random_state(self) -> Tensor:
        return torch.xpu.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        torch.xpu.set_rng_state(state, self.device)
