"""A weight matrix in MXFP4 as safetensors folders have it: codes in one tensor, scales in another (gpt-oss).

The format is OCP's (Microscaling Formats v1.0): 32 elements of a row share a scale, a byte e for 2^(e - 127); an element is
four bits, E2M1. A byte of codes has two neighbours, the lower bits first; GGUF's MXFP4 has the same numbers in another
order. The rule: both tensors stay as they are in the file; values are exact in fp32 and bfloat16, and bitwise those of
transformers' own conversion (integrations/mxfp4.py). In memory a matrix is unpacked like one of GGUF blocks: a chunk at a
time, in the scratch buffer that all matrices of a model share.

A folder is untrusted: sizes are checked here by the headers, and scales by what they say. No trained weight is near 2^126,
and 255 is not a number: a damaged file is refused before it trains anything.

Shapes: O rows, K blocks of 32 in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.files import read_tensor
from quant.gguf.types import chunk_elements
from quant.gguf.unpack import MXFP4_VALUES, Scratch, new_scratch, powers_of_two
from quant.gguf.weight import shared_scratch
from quant.headers import FolderError, TensorEntry
from quant.mxfp4.stacks import BLOCK, SCALES

LARGEST_SCALE = 252  # 6 x 2^(252 - 127) is finite in fp32 and bfloat16


@dataclass(frozen=True, eq=False)
class Mxfp4Weight:
    """A matrix (out, in); `codes` (bytes of two) and `exponents` are flat, `scratch` is shared."""

    codes: Tensor
    exponents: Tensor
    shape: tuple[int, int]
    scratch: Scratch
    block_elements: int = BLOCK

    @property
    def device(self) -> torch.device:
        """The device of both."""
        return self.codes.device

    @property
    def n_bytes(self) -> int:
        """The bytes of both."""
        return self.codes.nbytes + self.exponents.nbytes

    def scales(self) -> None:
        """Nothing: scales are powers of two, taken as they are."""

    def unpack_into(self, out: Tensor) -> Tensor:
        """Dequantise into `out` (out, in), contiguous, float32, bfloat16 or float16, and return it."""
        return self.unpack_part(None, out)

    def unpack_part(
        self, scales: Tensor | None, out: Tensor, *, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """Dequantise some rows, or some columns, into `out`, contiguous. Column bounds are multiples of a block."""
        del scales
        codes, exponents = self.codes.view(self.shape[0], -1, BLOCK // 2), self.exponents.view(self.shape[0], -1)
        rows = rows or slice(None)
        blocks = slice(None) if columns is None else slice(columns.start // BLOCK, columns.stop // BLOCK)
        codes, exponents = codes[rows, blocks], exponents[rows, blocks]
        step = max(1, chunk_elements(on_cpu=out.is_cpu) // out.shape[1])
        for start in range(0, len(codes), step):
            self.scratch.clear()
            some = slice(start, start + step)
            self._chunk(codes[some], exponents[some], out[some].view(-1, BLOCK))
        return out

    def _chunk(self, codes_OK: Tensor, exponents_OK: Tensor, target: Tensor) -> None:
        """Unpack rows of blocks into `target` (blocks, 32)."""
        is_single = target.dtype == torch.float32
        values = target if is_single else self.scratch.take(tuple(target.shape), torch.float32)
        index = self.scratch.take(tuple(codes_OK.shape), torch.int32).copy_(codes_OK).view(-1)
        torch.index_select(self.scratch.pairs(MXFP4_VALUES), 0, index, out=values.view(-1).view(torch.int64))
        values.mul_(powers_of_two(exponents_OK.unsqueeze(-1), self.scratch).view(-1, 1))
        if not is_single:
            target.copy_(values)


@dataclass(frozen=True)
class Mxfp4Layout:
    """The place of a matrix in a folder: "" are the codes."""

    parts: Mapping[str, TensorEntry]
    shape: tuple[int, int]
    block_elements: int = BLOCK
    moved: tuple[str, ...] = ("", SCALES)

    def shared(self, device: torch.device, known: dict[object, Tensor]) -> dict[str, Tensor]:
        """The scratch buffer, the same for all matrices of a model."""
        return {"scratch": shared_scratch(device, known)}

    def assemble(self, tensors: Mapping[str, Tensor]) -> Mxfp4Weight:
        """The matrix from both parts and the scratch buffer."""
        return Mxfp4Weight(tensors[""], tensors[SCALES], self.shape, Scratch(tensors["scratch"]))


def mxfp4_on_disk(entries: Mapping[str, TensorEntry], name: str) -> Mxfp4Layout:
    """The layout of a matrix whose scales are read, and checked. Raises FolderError."""
    entry, scales = entries[name], entries.get(name + SCALES)
    if scales is None:  # no file has it so: they are cut together
        raise FolderError(f"{entry.path}: {name!r} has no scales")
    highest = int(read_tensor(scales).max())
    if highest > LARGEST_SCALE:
        what = "is not a number" if highest == 255 else f"stands for 2^{highest - 127}, which no weight has"
        raise FolderError(f"{entry.path}: damaged: a scale of {name!r} {what}")
    return Mxfp4Layout({"": entry, SCALES: scales}, (entry.shape[0], entry.shape[1]))


def read_mxfp4(entries: Mapping[str, TensorEntry], name: str) -> Tensor:
    """One matrix in fresh CPU memory, in bfloat16, which has all its values. Raises FolderError."""
    layout, device = mxfp4_on_disk(entries, name), torch.device("cpu")
    parts = {part: _bytes(entry) for part, entry in layout.parts.items()}
    weight = layout.assemble({**parts, "scratch": new_scratch(device)})
    return weight.unpack_into(torch.empty(layout.shape, dtype=torch.bfloat16))


def _bytes(entry: TensorEntry) -> Tensor:
    return read_tensor(replace(entry, dtype="U8", shape=(entry.n_bytes,)))
