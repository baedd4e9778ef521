"""What each layer is told of a token anew (Gemma 4's per-layer embeddings), made from its id and its embedding.

For layer i: (norm(W_i embedding / sqrt(D)) + sqrt(P) table_i[id]) / sqrt(2). The table is the largest tensor of such a
model, and the matrix W is not small: both stay in their file, as the vocabularies do (vocabulary.py). Rows of the table are
read by id, and W one layer's rows at a time, so what is alive beside the result are a layer's rows.

The rule: values are those of transformers, which makes all layers' at once (tests/laws/test_families.py). Everything here
is frozen: there is no gradient. What it takes is plan/costs/own_input_bytes.py's matter; whoever changes one changes the
other.

Shapes: B sequences, T tokens, N = B x T, D hidden, L layers, P features of what a layer is told.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lopt_edge.run.model.vocabulary import Vocabulary

HALF = 2.0**-0.5  # so that the sum of two is as large as one


@dataclass(eq=False)
class OwnInputs:
    """The maker of tokens' own inputs to `n_layers` layers of `width` features each: table, matrix and norm, all frozen."""

    table: Vocabulary
    matrix: Vocabulary
    norm: nn.Module
    n_layers: int
    width: int

    @torch.no_grad()
    def of(self, ids_BT: Tensor, embedded_BTD: Tensor) -> Tensor:
        """The own inputs (B, T, L, P) of tokens with these ids and embeddings."""
        rows_NW = self.table.rows(ids_BT.reshape(-1))
        rows_NW.mul_(torch.tensor(self.width**0.5, dtype=rows_NW.dtype))  # rounded first, as transformers does
        for layer in range(self.n_layers):
            columns = slice(layer * self.width, (layer + 1) * self.width)
            rows_NW[:, columns].add_(self._projected(layer, embedded_BTD.flatten(0, 1))).mul_(HALF)
        return rows_NW.view(*ids_BT.shape, self.n_layers, self.width)

    def _projected(self, layer: int, embedded_ND: Tensor) -> Tensor:
        weight_PD = self.matrix.rows_from(layer * self.width, self.width)
        scaled: Tensor = nn.functional.linear(embedded_ND, weight_PD) * embedded_ND.shape[1] ** -0.5
        found: Tensor = self.norm(scaled)
        return found
