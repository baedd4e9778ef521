"""Counts the bytes of live tensors, op by op: a dispatch mode that sees every tensor that torch makes, over its storages.

For tests and `--memory-report`: it slows a step down, so one step is watched, not all. A storage counts once however many
tensors view it, from the call that made it until it is freed. What a kernel takes inside (attention's and the matrix
library's workspaces) is not seen, nor is memory of other libraries. Storages that existed before are counted when given to
`watch`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__ has no types
    """A dispatch mode that counts the bytes of live tensors of one device type.

    `live_bytes` is what is alive now, `peak_bytes` the most since the last `start_peak`.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.device_type = device_type
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages from now on, if they are not counted yet."""
        for tensor in tensors:
            if tensor.device.type == self.device_type:
                self._see(tensor.untyped_storage())

    def start_peak(self) -> None:
        """Let `peak_bytes` begin anew, at what is alive now."""
        self.peak_bytes = self.live_bytes

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._sizes or not n_bytes:
            return
        self._sizes[key] = n_bytes
        self.live_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self._see(tensor.untyped_storage())
        return result
