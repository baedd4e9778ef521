"""The task loss of held-out batches, forward only, layer by layer, in tiles of tokens: in one process, or along a pipeline.

It needs no optimizer and no plan, so it can be asked before there is one. In a pipeline process 0 sends the others each
batch, hidden states flow from process to process, the last one adds up the losses (in the order in which one process
would, so the sum is the same to the last bit) and sends process 0 the mean. Both ends of that talk stand here. A signal is
heard between batches; then the others learn that no more come. Shapes: B sequences, T tokens, N selected, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch, as_message, from_message
from lopt_edge.run.step.losses import task_loss

if TYPE_CHECKING:
    from lopt_edge.run.link import Link


def held_out_loss(
    model: Model,
    batches: Iterable[Batch],
    *,
    token_tile: int,
    layers: Sequence[int] | None = None,
    between: Callable[[], None],
    link: Link | None = None,
) -> float:
    """The mean task loss per supervised token of these batches, in tiles of `token_tile` tokens.

    `between` is called before each batch. `layers` are those that run (None: all). `link` leads to the other processes of
    a pipeline.
    """
    if link is not None:
        return _lead(model, link, batches, token_tile, between)
    total, n_supervised = 0.0, 0
    for batch in batches:
        between()
        for loss in _tile_losses(model, None, batch, token_tile, layers):
            total += loss
        n_supervised += batch.n_supervised
    return total / max(1, n_supervised)


def losses(
    model: Model,
    evaluated: Mapping[str, Sequence[Batch]],
    *,
    token_tile: int,
    between: Callable[[], None],
    layers: Sequence[int] | None = None,
    link: Link | None = None,
) -> dict[str, float]:
    """The mean task loss of the model as it is (or of `layers` alone) on each set of batches, by the set's name."""
    return {
        name: held_out_loss(model, batches, token_tile=token_tile, layers=layers, between=between, link=link)
        for name, batches in evaluated.items()
    }


def _lead(model: Model, link: Link, batches: Iterable[Batch], token_tile: int, between: Callable[[], None]) -> float:
    link.broadcast({"do": "evaluate", "token_tile": token_tile})
    stopped: KeyboardInterrupt | None = None
    for batch in batches:
        try:
            between()
        except KeyboardInterrupt as stop:  # of ours (errors.Interrupted)
            stopped = stop
            break
        link.broadcast({"batch": as_message(batch)})
        _tile_losses(model, link, batch, token_tile)
    link.broadcast({"batch": None})
    link.flush()
    loss = float(link.receive_message(len(link.parts) - 1)["loss"])
    if stopped is not None:
        raise stopped
    return loss


def work(model: Model, link: Link, token_tile: int) -> None:
    """Do a later process' part of one evaluation: run the batches that process 0 sends, until it sends no more."""
    total, n_supervised = 0.0, 0
    while (values := link.receive_message(0)["batch"]) is not None:
        batch = from_message(values, model.device)
        for loss in _tile_losses(model, link, batch, token_tile):
            total += loss
        n_supervised += batch.n_supervised
    link.flush()
    if link.is_last:
        link.send_message(0, {"loss": total / max(1, n_supervised)})


def batch_losses(model: Model, batch: Batch, token_tile: int, layers: Sequence[int] | None) -> list[float]:
    """The summed task loss of each tile of a batch, in one process: what a rank has of an evaluation."""
    return _tile_losses(model, None, batch, token_tile, layers)


@torch.no_grad()
def _tile_losses(
    model: Model, link: Link | None, batch: Batch, token_tile: int, layers: Sequence[int] | None = None
) -> list[float]:
    """The summed loss of each tile; an empty list where the hidden states are sent on instead."""
    if link is None or link.rank == 0:
        hidden_BTD = model.embed(batch.ids_BT)
    else:
        hidden_BTD = link.receive_boundary((*batch.ids_BT.shape, model.facts.hidden_size), model.dtype, model.device)
    hidden_BTD = model.run_all(
        hidden_BTD, model.layer_context(hidden_BTD, batch.ids_BT, lengths=batch.in_a_row), layers=layers
    )
    if link is not None and not link.is_last:
        link.send_boundary(hidden_BTD)
        return []
    selected_ND = hidden_BTD.flatten(0, 1)[batch.supervised_N]
    tiles = (slice(start, start + token_tile) for start in range(0, len(selected_ND), token_tile))
    return [task_loss(model, selected_ND[tile], batch.targets_N[tile]).item() for tile in tiles]
