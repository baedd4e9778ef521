"""The block types in which a GGUF model's matrices are stored: they differ from layer to layer, and so do their bytes.

By arithmetic on the types' block sizes alone (quant/gguf/types.py). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.gguf.types import TYPES


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
    def text(self) -> str:
        """The types by how often they occur, for a person."""
        kinds = [kind for layer in self.layers for kind in layer]
        return ", ".join(sorted(set(kinds), key=lambda kind: -kinds.count(kind)))
