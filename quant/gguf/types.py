"""The block types of GGUF: how many elements and bytes a block has, and what unpacking takes beside the result. No torch.

A tensor in such a type is a row of blocks: `block_elements` numbers of one row of the matrix in `block_bytes` bytes. Names
and numbers are those of ggml (ggml.h, `enum ggml_type`, and the block structs of ggml-common.h). The rule: whatever unpacks
takes its temporaries out of one scratch buffer that a model has once (`scratch_bytes`), whatever the type, so that a plan
needs no byte formula a type. Types that we do not unpack are named here too, so that a refusal can name them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

CPU_CHUNK = 1 << 17  # elements unpacked at a time: 512 KiB in fp32 stay near the core
DEVICE_CHUNK = 1 << 22
SCRATCH_PER_ELEMENT = 12  # bytes; the most that a type takes (IQ4_NL to half precision), tests/quant/gguf/test_unpack.py
TABLE_BYTES = 256 * 8  # a word for each value of a byte
TABLES_BYTES = 3 * TABLE_BYTES  # two of pairs of fp32, one of bits
ALIGNMENT = 64


@dataclass(frozen=True)
class BlockType:
    """A type of ggml: elements and bytes of a block."""

    name: str
    number: int
    block_elements: int
    block_bytes: int

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """The bytes of a tensor of this shape, whose rows are whole blocks."""
        return prod(shape) // self.block_elements * self.block_bytes

    @property
    def is_plain(self) -> bool:
        """Whether a block is one number, as it stands."""
        return self.block_elements == 1


TYPES = {
    name: BlockType(name, number, block_elements, block_bytes)
    for name, number, block_elements, block_bytes in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("MXFP4", 39, 32, 17),
    )
}
BY_NUMBER = {one.number: one for one in TYPES.values()}
# what ggml has beside, for a refusal
OTHER_NAMES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def chunk_elements(*, on_cpu: bool) -> int:
    """The number of elements unpacked at a time; a multiple of every block."""
    return CPU_CHUNK if on_cpu else DEVICE_CHUNK


def scratch_bytes(*, on_cpu: bool) -> int:
    """The bytes of the scratch buffer that unpacking works in."""
    return TABLES_BYTES + SCRATCH_PER_ELEMENT * chunk_elements(on_cpu=on_cpu)
