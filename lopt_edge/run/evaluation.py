"""The held-out loss of a model as it stands: forward only, layer by layer, the loss in tiles of tokens.

It needs no optimizer and no plan, so it can be asked before there is one. Shapes: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lopt_edge.run.batches import Batch
from lopt_edge.run.load import Model
from lopt_edge.run.losses import task_loss


@torch.no_grad()
def held_out_loss(
    model: Model,
    batches: Sequence[Batch],
    *,
    token_tile: int,
    layers: Sequence[int] | None = None,
    between: Callable[[], None],
) -> float:
    """Mean task loss per supervised token, in tiles of so many tokens. `between`: before each batch.

    `layers`: those that run, where it is not all of them.
    """
    total, n_supervised = 0.0, 0
    for batch in batches:
        between()
        hidden_BTD = model.embed(batch.ids_BT)
        frame = model.frame(hidden_BTD)
        hidden_BTD = model.run_all(hidden_BTD, frame, layers=layers)
        selected_ND = hidden_BTD.flatten(0, 1)[batch.supervised_N]
        for start in range(0, len(selected_ND), token_tile):
            tile = slice(start, start + token_tile)
            total += task_loss(model, selected_ND[tile], batch.targets_N[tile]).item()
        n_supervised += batch.n_supervised
    return total / max(1, n_supervised)
