"""Block types, GGUF's and ours: how many elements and bytes a block has, what unpacking takes beside the result. No torch.

A tensor in such a type is a row of blocks: `block_elements` numbers of one row of the matrix in `block_bytes` bytes. Names
and numbers are those of ggml (ggml.h, `enum ggml_type`, and the block structs of ggml-common.h). The rule: whatever unpacks
takes its temporaries out of one scratch buffer that a model has once (`scratch_bytes`), whatever the type, so that a plan
needs no byte formula a type. Types that we do not unpack are named here too, so that a refusal can name them.

`SPLIT` is no block type: a matrix in two tensors, which files other than GGUF's have (quant/mxfp4).

`GROUPED` are blocks of our own, for what other formats (GPTQ, AWQ, compressed-tensors, FP8) have as matrices of codes,
scales and zero points (quant/grouped): a group of a row with its scale before it. No GGUF file has them. Of each there is
one more, `_ORDER`, whose columns lie group by group in another order than the matrix' own (GPTQ's act-order): a second
tensor says where each column of the matrix lies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
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
    is_ordered: bool = False  # its columns lie in an order that a tensor beside the blocks says

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
GROUP_ELEMENTS = (256, 128, 64, 32)  # a larger group of the format is stored as several with the same scale
SCALE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
CODE_BITS = {"INT2": 2, "INT4": 4, "INT8": 8, "FP8": 8}  # integers are unsigned, with a zero point in the block


def _grouped(code: str, elements: int, scale: str) -> BlockType:
    n_zero = 0 if code == "FP8" else SCALE_BYTES[scale]  # int16 or int32, so that what follows is aligned
    n_bytes = SCALE_BYTES[scale] + n_zero + elements * CODE_BITS[code] // 8
    return BlockType(f"{code}_G{elements}_{scale}", -1, elements, n_bytes)


GROUPED = {one.name: one for one in (_grouped(*words) for words in product(CODE_BITS, GROUP_ELEMENTS, SCALE_BYTES))}
ORDER_SUFFIX, ORDER_BYTES = "_ORDER", 4  # an int32 for each column
ORDER = ".order"  # behind the name of a matrix: the tensor with them
ORDERED = {
    f"{name}{ORDER_SUFFIX}": replace(one, name=f"{name}{ORDER_SUFFIX}", is_ordered=True) for name, one in GROUPED.items()
}
BLOCK_TYPES = {**TYPES, **GROUPED, **ORDERED}
SPLIT = {"MXFP4_SPLIT": (16, 1)}  # bytes of 32 elements in each of its tensors: codes, scales
BY_NUMBER = {one.number: one for one in TYPES.values()}
# what ggml has beside, for a refusal
OTHER_NAMES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def parts_bytes(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The bytes of each tensor that a matrix of this shape is stored in."""
    if kind in SPLIT:
        return tuple(prod(shape) // 32 * one for one in SPLIT[kind])
    order = (ORDER_BYTES * shape[-1],) if BLOCK_TYPES[kind].is_ordered else ()
    return (BLOCK_TYPES[kind].n_bytes(shape), *order)


def chunk_elements(*, on_cpu: bool) -> int:
    """The number of elements unpacked at a time; a multiple of every block."""
    return CPU_CHUNK if on_cpu else DEVICE_CHUNK


def scratch_bytes(*, on_cpu: bool) -> int:
    """The bytes of the scratch buffer that unpacking works in."""
    return TABLES_BYTES + SCRATCH_PER_ELEMENT * chunk_elements(on_cpu=on_cpu)
