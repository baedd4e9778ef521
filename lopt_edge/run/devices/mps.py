"""Apple's GPUs, which torch drives as `mps`. No run has met one.

Their memory is the machine's: one tier, with the disk below it (`shares_ram`). So `host` settings are refused, nothing is
page-locked, and what the GPU takes is taken from every other program, too: a budget counts what Metal handed to torch.
Still a tensor of the GPU is no memory of the host's, so what goes to disk is copied on the way, in torch's one stream.

bitsandbytes 0.50.2 unpacks there into a tensor of its own, which it then copies, by a kernel that it may fetch from a hub
when it is first needed. Ours (quant/nf4.py) does without both. float64 is missing: sums that are kept in it elsewhere are
fp32. Metal has no peak counter: the peak is the most that was handed out at the moments when it was asked for, and torch's
allocator keeps what it was handed.

Attention is torch's, which makes whole scores there: the plan counts them (`score_copies` of device_kinds.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lopt_edge.plan.facts.device_kinds import MPS
from lopt_edge.run.devices.interface import Counters, SideStream, Wall
from lopt_edge.system.memory import available_bytes
from lopt_edge.system.processor import processor_name


class Mps:
    """An Apple GPU. Its memory is the machine's; what it takes is what Metal handed to torch."""

    kind = MPS

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def found(cls) -> tuple[Mps, ...]:
        device = cls.current()
        return () if device is None else (cls(device),)

    @classmethod
    def current(cls) -> torch.device | None:
        return torch.device(MPS.name, 0) if torch.backends.mps.is_available() else None

    def name(self) -> str:
        return f"{processor_name()} (its GPU)"

    def capability(self) -> str | None:
        return None

    def standing(self) -> str:
        return "untried: no run has met an Apple GPU; its rules are tried on CPU tensors (doctor --prove looks at this one)"

    def auto_dtype(self) -> tuple[torch.dtype, str]:
        return torch.bfloat16, "half the memory of float32 (Apple's GPUs compute it from macOS 14 on)"

    def check_dtype(self, name: str) -> None:
        pass

    def dtype_names(self) -> tuple[str, ...]:
        return ("float32", "float16", "bfloat16")

    def attention_kernel(self, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def made_deterministic(self) -> AbstractContextManager[None]:
        """Nothing: torch names no kernel of Metal's that would sum in another order."""
        return nullcontext()

    def made_current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def for_process(self, number: int) -> torch.device:
        return self.device

    def total_bytes(self) -> int:
        return torch.mps.recommended_max_memory()

    def free_bytes(self) -> int:
        return min(self.total_bytes(), available_bytes() + self.taken_bytes())

    def taken_bytes(self) -> int:
        return torch.mps.driver_allocated_memory()

    def peak_bytes(self) -> int:
        return torch.mps.driver_allocated_memory()

    def counters(self) -> Counters | None:
        return _MpsCounters()

    def allocator(self) -> str | None:
        return None

    def settle_allocator(self) -> None:
        """Nothing: what torch's allocator does there is left as it is."""

    def limit(self, n_bytes: int, *, context_bytes: int) -> Wall:
        """Bound torch's allocator by `n_bytes` less `context_bytes`, which Metal takes beside it."""
        share = max(0, n_bytes - context_bytes) / self.total_bytes()
        torch.mps.set_per_process_memory_fraction(min(1.0, share))
        return Wall(lambda: torch.mps.set_per_process_memory_fraction(1.0))

    def side_stream(self) -> SideStream | None:
        return _MpsStream()

    def pin(self, block: Tensor) -> bool:
        return False

    def unpin(self, block: Tensor) -> None:
        pass

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def random_state(self) -> Tensor:
        return torch.mps.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.mps.set_rng_state(state)


class _MpsStream:
    """torch's one stream under another name: copies wait for what was begun before them, and marks are its events."""

    def record_event(self) -> Any:
        event = torch.mps.Event()
        event.record()
        return event

    def mark_compute(self) -> Any:
        return None

    def after(self, mark: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def hold_compute(self, mark: Any) -> None:
        """Nothing: what comes later in a stream comes later."""

    def synchronize(self) -> None:
        torch.mps.synchronize()


class _MpsCounters:
    """Counters whose peak is the most that was there when they were asked."""

    def __init__(self) -> None:
        self.most = 0

    @property
    def live_bytes(self) -> int:
        live = torch.mps.current_allocated_memory()
        self.most = max(self.most, live)
        return live

    @property
    def peak_bytes(self) -> int:
        return max(self.most, self.live_bytes)

    def start_peak(self) -> None:
        self.most = 0
