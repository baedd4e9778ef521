"""The block types in which a model's matrices are stored: they differ from layer to layer, and so do their bytes.

Those of a GGUF file, of another program's folder that was laid out in blocks, or of one whose experts are in MXFP4. By
arithmetic on the types' block sizes alone (quant/gguf/types.py). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.gguf.types import BLOCK_TYPES, CODE_BITS, GROUPED, ORDERED, SPLIT

# times the seconds of NF4 that unpacking to fp32 takes on a CPU (tools/results/unpack.csv)
UNPACK_TIMES = {
    "F32": 0.3, "F16": 0.3, "BF16": 0.3, "Q4_0": 2.0, "Q4_1": 2.2, "Q5_0": 2.8, "Q5_1": 2.8, "Q8_0": 0.7, "Q2_K": 3.0,
    "Q3_K": 6.7, "Q4_K": 3.6, "Q5_K": 5.2, "Q6_K": 2.8, "IQ4_NL": 2.6, "IQ4_XS": 4.5, "MXFP4": 3.8, "MXFP4_SPLIT": 1.9,
}  # fmt: skip
UNPACK_TIMES_OF_CODES = {"INT2": 2.4, "INT4": 2.1, "INT8": 1.3, "FP8": 3.4}  # of groups, by what their codes are
PICKING_TIMES = 0.6  # of columns that lie in another order
assert set(UNPACK_TIMES_OF_CODES) == set(CODE_BITS)
UNPACK_TIMES |= {name: UNPACK_TIMES_OF_CODES[name.partition("_")[0]] for name in GROUPED}
UNPACK_TIMES |= {name: UNPACK_TIMES_OF_CODES[name.partition("_")[0]] + PICKING_TIMES for name in ORDERED}
assert set(UNPACK_TIMES) == {*BLOCK_TYPES, *SPLIT}


@dataclass(frozen=True)
class Forms:
    """The types of each layer's linear layers, in the order of the facts' `linears`, of the embedding, and of the head.

    `experts`: of each layer those of an expert's matrices, the same for all of its experts; nothing where it has none.
    """

    layers: tuple[tuple[str, ...], ...]
    embedding: str
    head: str
    experts: tuple[tuple[str, ...], ...] = ()

    def __hash__(self) -> int:
        """A hash of a few fields: there may be a thousand of them, and caches ask for it often."""
        return hash((self.layers[0], len(self.layers), self.embedding, self.head))

    @property
    def packed(self) -> bool:
        """Whether anything is stored in blocks of several numbers, so that unpacking needs its scratch buffer."""
        kinds = {self.embedding, self.head, *(kind for layer in (*self.layers, *self.experts) for kind in layer)}
        return not all(kind in BLOCK_TYPES and BLOCK_TYPES[kind].is_plain for kind in kinds)

    def experts_of(self, layer: int) -> tuple[str, ...]:
        """The types of the matrices of an expert in a layer."""
        return self.experts[layer] if self.experts else ()

    @property
    def text(self) -> str:
        """The types by how often they occur, for a person."""
        kinds = [kind.partition("_SPLIT")[0] for layer in (*self.layers, *self.experts) for kind in layer]
        return ", ".join(sorted(set(kinds), key=lambda kind: -kinds.count(kind)))
