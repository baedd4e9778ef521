"""What making tokens' own inputs to the layers takes (run/model/own_inputs.py), line by line, by arithmetic. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lopt_edge.plan.costs.vocabulary_bytes import gather_rows

if TYPE_CHECKING:
    from lopt_edge.plan.costs.programs import Replay
    from lopt_edge.plan.costs.shape import Vocabularies


def own_inputs(replay: Replay, stored: Vocabularies, n_rows: int) -> None:
    """Take what making them for `n_rows` tokens needs on the replay's heap; the result stays."""
    heap, shape = replay.heap, replay.shape
    facts, c = shape.facts, shape.itemsize
    assert facts.own_inputs is not None
    width, n_columns = facts.own_inputs.width, facts.n_layers * facts.own_inputs.width
    gather_rows(heap, shape, n_rows, stored=stored, n_columns=n_columns, n_known=facts.own_inputs.n_tokens)
    heap.take(n_rows * n_columns * c)
    with heap.call():
        raw = width * facts.hidden_size * stored.itemsize * (not shape.kind.host_is_below)
        cast = width * facts.hidden_size * c
        converted = shape.kind.host_is_below or stored.itemsize != c
        heap.touch(raw + cast * converted)
        heap.take(cast if converted else raw)  # a layer's rows of the matrix
        heap.take(n_rows * width * c)
        heap.touch(n_rows * width * c)  # the product, then scaled
        heap.take(n_rows * width * c)  # the norm's result
        replay.norm("norm_forward", n_rows, width)
