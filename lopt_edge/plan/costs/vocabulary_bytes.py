"""What reading rows of a vocabulary by id takes (run/model/vocabulary.py), line by line, by arithmetic. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lopt_edge.plan.costs.module_bytes import Heap

if TYPE_CHECKING:
    from lopt_edge.plan.costs.shape import LayerShape, Vocabularies


def gather_rows(
    heap: Heap,
    shape: LayerShape,
    n_ids: int,
    *,
    stored: Vocabularies,
    n_columns: int | None = None,
    n_known: int | None = None,
) -> None:
    """Take what reading rows by id needs, each id its own row at worst: of the embedding, or of a table of `n_known` rows
    of `n_columns`."""
    c, width, n_known = shape.itemsize, n_columns or shape.facts.hidden_size, n_known or shape.facts.vocab_size
    with heap.call():
        cast = c * (c != stored.itemsize)
        if row := stored.packed_row_bytes:
            n_rows = n_ids if stored.head_resident else min(n_ids, n_known)
            heap.take(0 if stored.head_resident else 8 * n_ids)
            heap.take(n_rows * (row + width * c))
            heap.take(0 if stored.head_resident else n_ids * width * c)
            return
        if stored.head_resident:
            heap.take(n_ids * width * (stored.itemsize + cast))
            return
        n_unique, in_ram = min(n_ids, n_known), not shape.kind.host_is_below
        heap.take(8 * n_ids)
        heap.take(n_unique * width * (stored.itemsize + cast if in_ram else c))
        heap.take(n_ids * width * c)
