"""A weight matrix in blocks, of a GGUF file or of our own: where it lies, and unpacking it, or some of its rows or columns.

The blocks stay as they are in the file. The rule: one chunk is unpacked at a time, in the scratch buffer that all matrices
of a model share, so nothing is allocated here; in fp32 the result is that of the `gguf` package bit for bit, in half
precision it is that rounded once. Rows are whole blocks, so any of them can be cut out; columns at multiples of a block.

Where columns lie in another order than the matrix' own (`order`), whole rows are unpacked and the columns then picked: cut
into n parts by columns, such a matrix is unpacked n times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.files import read_bytes, read_tensor, tensor_bytes
from quant.gguf.types import BLOCK_TYPES, ORDER, BlockType, chunk_elements
from quant.gguf.unpack import Scratch, new_scratch, unpack_blocks
from quant.headers import FolderError, TensorEntry

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class GgufWeight:
    """A matrix (out, in) of blocks; `blocks` are its bytes, flat, `scratch` is shared.

    `order` (in,) int32: where each column lies in the blocks, if not in its place.
    """

    blocks: Tensor
    shape: tuple[int, int]
    type: BlockType
    scratch: Scratch
    order: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the blocks."""
        return self.blocks.device

    @property
    def n_bytes(self) -> int:
        """The bytes of the blocks, and of their order."""
        return self.blocks.nbytes + (0 if self.order is None else self.order.nbytes)

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
        if self.order is not None:
            return self._picked(blocks, self.order[columns or slice(None)], out)
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

    def _picked(self, blocks: Tensor, order: Tensor, out: Tensor) -> Tensor:
        """Unpack blocks (rows, all of a row, bytes) and pick the columns that `order` names, in fp32, which is fastest."""
        n_columns, is_single = self.shape[1], out.dtype == torch.float32
        step = max(1, chunk_elements(on_cpu=out.is_cpu) // (n_columns if is_single else 2 * n_columns))
        for start in range(0, len(blocks), step):
            self.scratch.clear()
            some, target = blocks[start : start + step], out[start : start + step]
            values = self.scratch.take((len(some), n_columns), torch.float32)
            self._chunk(some.view(-1, self.type.block_bytes), values.view(-1, self.block_elements))
            if is_single:
                torch.index_select(values, 1, order, out=target)
            else:
                picked = self.scratch.take(tuple(target.shape), torch.float32)
                target.copy_(torch.index_select(values, 1, order, out=picked))
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


def gguf_layout(entries: Mapping[str, TensorEntry], name: str) -> GgufLayout:
    """The layout of a matrix at its place in a file. Raises FolderError for one whose order is missing."""
    entry = entries[name]
    parts, kind = {"": entry}, BLOCK_TYPES[entry.dtype]
    if kind.is_ordered:
        if name + ORDER not in entries:
            raise FolderError(f"{entry.path}: the order of the columns of {name!r} is missing")
        parts[ORDER] = entries[name + ORDER]
    return GgufLayout(parts, (entry.shape[0], entry.shape[1]), kind, tuple(parts))


def read_gguf(entries: Mapping[str, TensorEntry], name: str) -> Tensor:
    """One tensor in fresh CPU memory: plain numbers as they are stored, blocks in fp32. Raises FolderError."""
    entry = entries[name]
    if entry.dtype not in BLOCK_TYPES or BLOCK_TYPES[entry.dtype].is_plain:
        return read_tensor(entry)
    if BLOCK_TYPES[entry.dtype].is_ordered:
        return _read_ordered(gguf_layout(entries, name))
    blocks = torch.empty(entry.n_bytes, dtype=torch.uint8)
    read_bytes(entry, tensor_bytes(blocks))
    shape = (entry.n_bytes // BLOCK_TYPES[entry.dtype].n_bytes((entry.shape[-1],)), entry.shape[-1])
    weight = GgufWeight(blocks, shape, BLOCK_TYPES[entry.dtype], Scratch(new_scratch(torch.device("cpu"))))
    return weight.unpack_into(torch.empty(shape)).view(entry.shape)


def _read_ordered(layout: GgufLayout) -> Tensor:
    parts = {part: read_tensor(replace(entry, dtype="U8", shape=(entry.n_bytes,))) for part, entry in layout.parts.items()}
    weight = layout.assemble({**parts, "scratch": new_scratch(torch.device("cpu"))})
    return weight.unpack_into(torch.empty(layout.shape))


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
        """The matrix from its blocks, their order if they have one, and the scratch buffer."""
        order = tensors[ORDER].view(torch.int32) if self.type.is_ordered else None
        return GgufWeight(tensors[""], self.shape, self.type, Scratch(tensors["scratch"]), order)
