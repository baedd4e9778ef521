"""The block types in which a GGUF model's matrices are stored: they differ from layer to layer, and so do their bytes.

By arithmetic on the types' block sizes alone (quant/gguf/types.py). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.gguf.types import TYPES

# times the seconds of NF4 that unpacking to fp32 takes on a CPU (tools/results/unpack.csv)
UNPACK_TIMES = {
    "F32": 0.4, "F16": 0.3, "BF16": 0.3, "Q4_0": 2.8, "Q4_1": 2.6, "Q5_0": 4.0, "Q5_1": 4.2, "Q8_0": 1.0, "Q2_K": 4.2,
    "Q3_K": 7.0, "Q4_K": 3.3, "Q5_K": 5.6, "Q6_K": 3.0, "IQ4_NL": 2.2, "IQ4_XS": 4.1, "MXFP4": 3.0,
}  # fmt: skip


@dataclass(frozen=True)
class Forms:
    """The types of each layer's linear layers, in the order of the facts' `linears`, of the embedding, and of the head."""

    layers: tuple[tuple[str, ...], ...]
    embedding: str
    head: str

    def __hash__(self) -> int:
        """A hash of a few fields: there may be a thousand of them, and caches ask for it often."""
        return hash((self.layers[0], len(self.layers), self.embedding, self.head))

    @property
    def packed(self) -> bool:
        """Whether anything is stored in blocks of several numbers, so that unpacking needs its scratch buffer."""
        kinds = {self.embedding, self.head, *(kind for layer in self.layers for kind in layer)}
        return not all(TYPES[kind].is_plain for kind in kinds)

    @property
    def unpack_times(self) -> float:
        """How many times the seconds of NF4 its matrices take to unpack, in the mean."""
        kinds = [kind for layer in self.layers for kind in layer]
        return sum(UNPACK_TIMES[kind] for kind in kinds) / len(kinds)

    @property
    def text(self) -> str:
        """The types by how often they occur, for a person."""
        kinds = [kind for layer in self.layers for kind in layer]
        return ", ".join(sorted(set(kinds), key=lambda kind: -kinds.count(kind)))
