"""What every layer needs of a micro-batch beside the hidden states, made once and shared by all layers.

The rule: no layer's graph owns any of it. Keys and values that later layers attend to come in as layers run; all else is
there from the beginning. Nothing here is computed.

Shapes: B sequences, T tokens, L layers, P features of what a layer is told of a token, E features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lopt_edge.run.model.own_body import Call
from lopt_edge.run.model.sequences import Sequences

KeysValues = tuple[Tensor, Tensor]  # (B, heads, T, E) each


@dataclass(eq=False)
class LayerContext:
    """What every layer needs beside the hidden states: positions, rotary tables and masks, by layer type.

    `sequences`: what lies in the one row, by layer type; empty where each sequence has a row of its own. `own_inputs`: what
    each layer is told of each token anew. `keys`: the keys and values that later layers attend to, by layer type. `calls`:
    all of it by layer, where transformers' own code says what a layer is called with.
    """

    position_ids_1T: Tensor
    rotary: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor | None]
    sequences: dict[str, Sequences]
    own_inputs_BTLP: Tensor | None = None
    keys: dict[str, KeysValues] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()

    def tensors(self) -> list[Tensor]:
        """The tensors that all layers share, so that no layer's graph owns them."""
        tables = [table for pair in (*self.rotary.values(), *self.keys.values()) for table in pair]
        own = [] if self.own_inputs_BTLP is None else [self.own_inputs_BTLP]
        own += [tensor for call in self.calls for tensor in call.tensors()]
        return [self.position_ids_1T, *tables, *own, *(mask for mask in self.masks.values() if mask is not None)]
