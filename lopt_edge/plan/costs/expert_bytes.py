"""What the experts of a layer take inside one call (quant/experts.py), for the routing that takes the most. No torch.

By arithmetic as in module_bytes.py: the order of the choices, the gradients of x and of the experts' weights, unpacking.
What lives in a tile of one expert's tokens is traced (tools/trace_bytes.py). The rule: a plan holds a tile as large as any
routing makes it, all tokens at one expert or a whole tile; where the tokens spread, a step takes less by what such a tile
has more than the largest that there is, and never more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lopt_edge.plan.costs.module_bytes import Heap, unpack_matrix
from lopt_edge.plan.facts.layers import LinearFacts

if TYPE_CHECKING:
    from lopt_edge.plan.costs.shape import LayerShape


def _routed(heap: Heap, shape: LayerShape, n_rows: int) -> None:
    """Sort the choices of all tokens by expert, their places stay; unpack an expert's matrices one after the other."""
    experts = shape.layer.experts
    assert experts is not None
    choices = 8 * n_rows * experts.active
    heap.touch(3 * choices)
    heap.touch(2 * choices + 8 * experts.count)
    heap.take(choices)
    for rows, columns in dict.fromkeys(experts.shapes):
        unpack_matrix(heap, shape, LinearFacts("", columns, rows, bias=False))


def experts_forward(heap: Heap, shape: LayerShape, n_rows: int, *, tile: int) -> None:
    """Take what a forward of the experts needs; `tile` are the bytes within a tile as large as any routing makes it."""
    with heap.call():
        heap.take(n_rows * shape.facts.hidden_size * shape.itemsize)
        _routed(heap, shape, n_rows)
        heap.touch(tile)


def experts_backward(heap: Heap, shape: LayerShape, n_rows: int, *, tile: int) -> None:
    """Take what a backward of the experts needs: the gradients of x, in fp32, and of the experts' weights."""
    experts, c = shape.layer.experts, shape.itemsize
    assert experts is not None
    with heap.call():
        dx = heap.take(4 * n_rows * experts.hidden)
        heap.take(n_rows * experts.active * (4 if experts.full_weights else c))
        with heap.call():
            _routed(heap, shape, n_rows)
            heap.touch(tile)
        heap.touch(dx // 4 * c if c != 4 else 0)
