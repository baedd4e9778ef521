"""A stand-in for the CUDA runtime's registering of host memory, that keeps books and is as strict as the real one.

The rules of the real one, each broken by a raise here: a range that overlaps a registered one cannot be registered; what is
unregistered must begin where a registered range begins; memory that is freed while it is registered is a fault of whoever
registered it (the next allocation there would be pinned without knowing). A refusal leaves an error behind, which the next
launch would raise unless it is read (`cudaGetLastError`).
"""

from __future__ import annotations

from bisect import bisect_right

from torch import Tensor

SUCCESS, INVALID, OUT_OF_MEMORY, ALREADY = 0, 1, 2, 712


class Ledger:
    """The books. `limit_bytes` is where the driver begins to refuse (None: never)."""

    def __init__(self, *, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.ranges: dict[int, int] = {}
        self.n_registered = self.n_bytes = self.peak_bytes = 0
        self.refusals = 0
        self.error = SUCCESS  # left behind

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:  # the name is the runtime's
        if n_bytes <= 0:
            return self._refuse(INVALID)
        for start, size in self.ranges.items():
            if address < start + size and start < address + n_bytes:
                raise AssertionError(f"{n_bytes} bytes at {address:#x} overlap a registered range at {start:#x}")
        if self.limit_bytes is not None and self.n_bytes + n_bytes > self.limit_bytes:
            return self._refuse(OUT_OF_MEMORY)
        self.ranges[address] = n_bytes
        self.n_registered += 1
        self.n_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.n_bytes)
        return SUCCESS

    def cudaHostUnregister(self, address: int) -> int:  # the name is the runtime's
        if address not in self.ranges:
            raise AssertionError(f"nothing that begins at {address:#x} is registered")
        self.n_bytes -= self.ranges.pop(address)
        return SUCCESS

    def cudaGetLastError(self) -> int:  # the name is the runtime's
        error, self.error = self.error, SUCCESS
        return error

    def _refuse(self, error: int) -> int:
        self.refusals, self.error = self.refusals + 1, error
        return error

    def is_registered(self, tensor: Tensor) -> bool:
        """Whether all of the tensor's bytes are registered."""
        starts = sorted(self.ranges)
        at = bisect_right(starts, tensor.data_ptr()) - 1
        return at >= 0 and tensor.data_ptr() + tensor.nbytes <= starts[at] + self.ranges[starts[at]]
