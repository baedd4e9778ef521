"""How AdamW's two moments are stored: in fp32, or in 8 bits.

A group's moments are one tensor, so that they move between tiers as one piece. fp32: (2, n). 8 bits: for each moment its
codes and then the fp32 scales of its blocks; codes are bitsandbytes' dynamic maps, signed for the first moment and unsigned
for the second (arXiv 2110.02861, blocks of 256). `unpacked` hands out the two moments as flat fp32 tensors and takes them
back when it ends. Which group is where is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from quant.nf4 import import_packing

BLOCK = 256


class Moments(Protocol):
    """A form in which a group's two moments are stored. `n_elements` is the group's size."""

    def form(self, n_elements: int) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape of a group's stored moments."""

    def zeros(self, n_elements: int) -> Tensor:
        """The stored form of moments that are 0, on the device."""

    def unpacked(self, stored: Tensor, n_elements: int) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """A context with both moments as flat fp32 tensors; what is changed in them is stored at its end."""


def make_moments(optimizer: str, device: torch.device) -> Moments:
    """The storage form of an optimizer's moments: 8 bits for adamw8bit, else fp32."""
    return EightBitMoments(device) if optimizer == "adamw8bit" else PlainMoments(device)


class PlainMoments:
    """Moments stored in fp32, exactly."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def form(self, n_elements: int) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.float32, (2, n_elements)

    def zeros(self, n_elements: int) -> Tensor:
        return torch.zeros(2, n_elements, dtype=torch.float32, device=self.device)

    @contextmanager
    def unpacked(self, stored: Tensor, n_elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield stored[0], stored[1]


class EightBitMoments:
    """Moments stored in blockwise dynamic 8 bits, rounded again after each update."""

    def __init__(self, device: torch.device) -> None:
        import_packing()
        from bitsandbytes.functional import create_dynamic_map

        self.device = device
        self.maps = tuple(
            create_dynamic_map(signed=signed).to(device)  # type: ignore[no-untyped-call]  # bitsandbytes has no types there
            for signed in (True, False)
        )

    def form(self, n_elements: int) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.uint8, (sum(_part_bytes(n_elements)) * 2,)

    def zeros(self, n_elements: int) -> Tensor:
        """The stored form of zeros: all scales are 0, so that every code stands for 0."""
        dtype, shape = self.form(n_elements)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @contextmanager
    def unpacked(self, stored: Tensor, n_elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_blockwise

        parts = list(self._parts(stored, n_elements))
        values = []
        for (codes, scales), code_map in zip(parts, self.maps, strict=True):
            state = QuantState(  # type: ignore[no-untyped-call]  # bitsandbytes has no types there
                absmax=scales, code=code_map, blocksize=BLOCK, dtype=torch.float32
            )
            values.append(dequantize_blockwise(codes, state))
        yield values[0], values[1]
        for value, (codes, scales), code_map in zip(values, parts, self.maps, strict=True):
            new, state = quantize_blockwise(value, code=code_map, blocksize=BLOCK)
            codes.copy_(new)
            scales.copy_(state.absmax)

    def _parts(self, stored: Tensor, n_elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (codes, scales) of each moment, as views."""
        for half in stored.view(2, -1):
            codes, scales = half.split(_part_bytes(n_elements))
            yield codes[:n_elements], scales.view(torch.float32)


def _part_bytes(n_elements: int) -> list[int]:
    """The bytes of one moment's codes (padded to whole words) and of its scales."""
    return [-(-n_elements // 4) * 4, 4 * -(-n_elements // BLOCK)]
