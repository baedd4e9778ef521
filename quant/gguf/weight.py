"""A weight matrix in blocks, of a GGUF file or of our own: where it lies, and unpacking it, or some of its rows or columns.

The blocks stay as they are in the file. The rule: one chunk is unpacked at a time, in the scratch buffer that all matrices
of a model share, so nothing is allocated here; in fp32 the result is that of the `gguf` package bit for bit, in half
precision it is that rounded once. Rows are whole blocks, so any of them can be cut out; columns at multiples of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.files import read_bytes, read_tensor, tensor_bytes
from quant.gguf.types import BLOCK_TYPES, BlockType, chunk_elements
from quant.gguf.unpack import Scratch, new_scratch, unpack_blocks
from quant.headers import TensorEntry

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class GgufWeight:
    """A matrix (out, in) of blocks; `blocks` are its bytes, flat, `scratch` is shared."""

    blocks: Tensor
    shape: tuple[int, int]
    type: BlockType
    scratch: Scratch

    @property
    def device(self) -> torch.device:
        """The device of the blocks."""
        return self.blocks.device

    @property
    def n_bytes(self) -> int:
        """The bytes of the blocks."""
        return self.blocks.nbytes

    @property
    def block_elements(self) -> int:
        """The elements of a row in one block."""
        return self.type.block_elements

    def scales(self) -> None:
        """Nothing: each block brings its own."""

    def unpack_into(self, out: Tensor) -> Tensor:
        """Dequantise into `out` (out, in), contiguous, float32, bfloat16 or float16, and return it."""
        return self.unpack_part(None, out)

    def unpack_part(
        self, scales: Tensor | None, out: Tensor, *, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """Dequantise some rows, or some columns, into `out`, contiguous. Column bounds are multiples of a block."""
        del scales
        n_rows, n_columns = self.shape
        if self.type.is_plain:
            matrix = self.blocks.view(PLAIN[self.type.name]).view(n_rows, n_columns)
            return out.copy_(matrix[rows or slice(None), columns or slice(None)])
        blocks = self.blocks.view(n_rows, -1, self.type.block_bytes)
        if rows is not None:
            blocks = blocks[rows]
        if columns is not None:
            return self._columns(blocks[:, columns.start // self.block_elements : columns.stop // self.block_elements], out)
        flat, target = blocks.reshape(-1, self.type.block_bytes), out.view(-1, self.block_elements)
        step = chunk_elements(on_cpu=out.is_cpu) // self.block_elements
        for start in range(0, len(flat), step):
            self.scratch.clear()
            self._chunk(flat[start : start + step], target[start : start + step])
        return out

    def _columns(self, blocks: Tensor, out: Tensor) -> Tensor:
        """Unpack blocks (rows, n, bytes) that do not lie side by side: a copy of each chunk does."""
        n_columns = out.shape[1]
        step = max(1, chunk_elements(on_cpu=out.is_cpu) // n_columns)
        for start in range(0, len(blocks), step):
            self.scratch.clear()
            some = blocks[start : start + step]
            copied = self.scratch.take(tuple(some.shape), torch.uint8).copy_(some)
            self._chunk(copied.view(-1, self.type.block_bytes), out[start : start + step].view(-1, self.block_elements))
        return out

    def _chunk(self, blocks: Tensor, target: Tensor) -> None:
        if target.dtype == torch.float32:
            unpack_blocks(self.type.name, blocks, target, self.scratch)
            return
        values = self.scratch.take(tuple(target.shape), torch.float32)
        unpack_blocks(self.type.name, blocks, values, self.scratch)
        target.copy_(values)


def shared_scratch(device: torch.device, known: dict[object, Tensor]) -> Tensor:
    """The scratch buffer among what matrices share; made if it is not there yet."""
    if "scratch" not in known:
        known["scratch"] = new_scratch(device)
    return known["scratch"]


def gguf_layout(entry: TensorEntry) -> GgufLayout:
    """The layout of a matrix at its place in a GGUF file."""
    return GgufLayout({"": entry}, (entry.shape[0], entry.shape[1]), BLOCK_TYPES[entry.dtype])


def read_gguf(entry: TensorEntry) -> Tensor:
    """One tensor in fresh CPU memory: plain numbers as they are stored, blocks in fp32. Raises FolderError."""
    if entry.dtype not in BLOCK_TYPES or BLOCK_TYPES[entry.dtype].is_plain:
        return read_tensor(entry)
    blocks = torch.empty(entry.n_bytes, dtype=torch.uint8)
    read_bytes(entry, tensor_bytes(blocks))
    shape = (entry.n_bytes // BLOCK_TYPES[entry.dtype].n_bytes((entry.shape[-1],)), entry.shape[-1])
    weight = GgufWeight(blocks, shape, BLOCK_TYPES[entry.dtype], Scratch(new_scratch(torch.device("cpu"))))
    return weight.unpack_into(torch.empty(shape)).view(entry.shape)


@dataclass(frozen=True)
class GgufLayout:
    """The place of a matrix in a GGUF file."""

    parts: Mapping[str, TensorEntry]
    shape: tuple[int, int]
    type: BlockType
    moved: tuple[str, ...] = ("",)

    @property
    def block_elements(self) -> int:
        """The elements of a row in one block."""
        return self.type.block_elements

    def shared(self, device: torch.device, known: dict[object, Tensor]) -> dict[str, Tensor]:
        """The scratch buffer, the same for all matrices of a model."""
        return {"scratch": shared_scratch(device, known)}

    def assemble(self, tensors: Mapping[str, Tensor]) -> GgufWeight:
        """The matrix from its blocks and the scratch buffer."""
        return GgufWeight(tensors[""], self.shape, self.type, Scratch(tensors["scratch"]))
