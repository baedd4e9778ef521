"""What a packed matrix must be able to do, whatever its form: be unpacked into a buffer, be moved, be measured in bytes.

Two sides. `PackedOnDisk` says where the parts of a matrix lie in files and which of them move with a layer; from those
parts, wherever they have been brought, it makes a `Packed`, which unpacks. Who computes (linear.py, gated_mlp.py, mixed.py)
and who moves (lopt_edge/run/tiers/weights.py) knows these two and no form. The forms are a file each: nf4.py,
gguf/weight.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from quant.headers import TensorEntry


class Packed(Protocol):
    """A matrix (out, in) in packed form, all of it on one device."""

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns of the matrix."""

    @property
    def device(self) -> torch.device:
        """The device of all the matrix' tensors."""

    @property
    def n_bytes(self) -> int:
        """The bytes of what belongs to this matrix alone; tables that matrices share are left out."""

    @property
    def block_elements(self) -> int:
        """The elements of a row that are packed together: columns can be cut out at multiples of it only."""

    def scales(self) -> Tensor | None:
        """What is computed once before parts of the matrix are unpacked; None where nothing is."""

    def unpack_into(self, out: Tensor) -> Tensor:
        """Dequantise into `out` (out, in), contiguous, float32, bfloat16 or float16, and return it."""

    def unpack_part(
        self, scales: Tensor | None, out: Tensor, *, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """Dequantise some rows, or some columns, into `out`, contiguous; `scales` are those of `scales()`."""


class PackedOnDisk(Protocol):
    """The places of a packed matrix' parts, by name; "" is the largest one."""

    @property
    def parts(self) -> Mapping[str, TensorEntry]:
        """The parts in files, by name."""

    @property
    def moved(self) -> tuple[str, ...]:
        """The names of those parts that come and go with a layer, in the order of its buffer."""

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns of the matrix."""

    @property
    def block_elements(self) -> int:
        """As of `Packed`."""

    def shared(self, device: torch.device, known: dict[object, Tensor]) -> dict[str, Tensor]:
        """The parts that stay on the device; what other matrices have as well is looked up in `known`, or put there."""

    def assemble(self, tensors: Mapping[str, Tensor]) -> Packed:
        """The matrix from its moved parts as flat tensors of bytes, and its shared ones."""
