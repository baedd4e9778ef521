"""Stacks of experts in MXFP4, as the headers of a folder have them: cut into an entry a matrix. No torch.

The rule: nothing is read; what does not have the sizes that config.json needs is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from quant.gguf.types import SPLIT
from quant.headers import FolderError, TensorEntry

KIND = next(iter(SPLIT))
BLOCK = 32
BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"  # of a stack's tensors
SCALES = ".scales"  # of the entry beside a matrix'


def is_mxfp4(entries: Mapping[str, TensorEntry], name: str) -> bool:
    """Whether the matrix `name` is stored in this form."""
    return name in entries and entries[name].dtype == KIND


def cut_stacks(
    blocks: TensorEntry, scales: TensorEntry | None, shape: tuple[int, int], names: list[str]
) -> dict[str, TensorEntry]:
    """The entries of each matrix (with `shape`, by these names) of a stack in this form, and of its scales.

    Nothing is read. Raises FolderError for tensors of other sizes.
    """
    n_rows, n_blocks, n_each = shape[0], shape[1] // BLOCK, prod(shape) // BLOCK
    expected = (len(names), n_rows, n_blocks, BLOCK // 2)
    for entry, wanted in ((blocks, expected), (scales, expected[:3])):
        if shape[1] % BLOCK or entry is None or (entry.dtype, entry.shape) != ("U8", wanted):
            found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            where = blocks.name if entry is blocks else blocks.name.removesuffix(BLOCKS_SUFFIX) + SCALES_SUFFIX
            raise FolderError(f"tensor {where!r} is {found}, config.json says U8 {list(wanted)}")
    assert scales is not None
    found_entries = dict[str, TensorEntry]()
    for number, name in enumerate(names):
        codes = replace(blocks, name=name, dtype=KIND, shape=shape, start=blocks.start + number * n_each * 16,
                        n_bytes=n_each * 16)  # fmt: skip
        own = replace(scales, name=name + SCALES, shape=(n_rows, n_blocks), start=scales.start + number * n_each,
                      n_bytes=n_each)  # fmt: skip
        found_entries |= {name: codes, name + SCALES: own}
    return found_entries
