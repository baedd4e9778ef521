"""What our modules take inside one call: unpacking, LoRA, the blocked MLP, a vocabulary's rows. By arithmetic, no torch.

Each function follows its module line by line with sizes instead of tensors (quant/nf4.py, quant/linear.py, quant/mixed.py,
quant/gated_mlp.py; sequences.py, query_tiles.py, chunks.py and vocabulary.py of run/model), on a `Heap` that remembers
the most; whoever changes one changes the other (tests/plan/costs/test_module_bytes.py, tests/run/model and law 6 compare
them). What a call leaves behind (its result) is taken inside as well and let go at the end: the program around it takes it
(layer_bytes.py). On CUDA bitsandbytes' kernel unpacks, without an index.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from lopt_edge.plan.costs.tiles import _tile, _tile_queries
from lopt_edge.plan.facts.device_kinds import DeviceKind
from lopt_edge.plan.facts.layers import LinearFacts
from quant.sizes import (
    BLOCK_ELEMENTS,
    DELTA_CHUNK,
    DELTA_STATES_APART,
    adds_apart,
    rows_at_once,
    unpack_chunk,
)

if TYPE_CHECKING:
    from lopt_edge.plan.costs.shape import LayerShape


class Heap:
    """A count of bytes: those that live, from the making of this heap on, and the most that ever lived."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def take(self, n_bytes: int) -> int:
        """Allocate so many bytes, and return them for `free`."""
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
        return n_bytes

    def free(self, *n_bytes: int) -> None:
        """Release so many bytes."""
        self.live -= sum(n_bytes)

    def touch(self, n_bytes: int) -> None:
        """Take so many bytes and let them go at once."""
        self.peak = max(self.peak, self.live + n_bytes)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A context that lets go at its end whatever was taken inside."""
        before = self.live
        yield
        self.live = before


# quant/nf4.py ----------------------------------------------------------------------------------------------------------


def unpack_scales(heap: Heap, n_elements: int, kind: DeviceKind) -> None:
    """Take the fp32 block scales of a matrix, which stay; where our code unpacks an int32 index lives on the way."""
    scales = 4 * ceil(n_elements / BLOCK_ELEMENTS)
    heap.touch(2 * scales if kind.unpacks_here else scales)
    heap.take(scales)


def unpack_codes(heap: Heap, n_elements: int, kind: DeviceKind, *, itemsize: int) -> None:
    """Touch what our code takes to unpack the codes: a chunk's int32 index, and for half precision its values in fp32."""
    if kind.unpacks_here:
        chunk = min(unpack_chunk(on_cpu=kind.computes_on_cores), n_elements // 2)
        heap.touch(4 * chunk + (0 if itemsize == 4 else 8 * chunk))


# quant/linear.py -------------------------------------------------------------------------------------------------------


def unpack_matrix(heap: Heap, shape: LayerShape, linear: LinearFacts) -> None:
    """Unpack a matrix into the shared buffer: its scales go at the end."""
    n_elements, kind = linear.in_features * linear.out_features, shape.kind
    if shape.facts.forms is not None:  # in a scratch buffer that is always there
        return
    with heap.call():
        unpack_scales(heap, n_elements, kind)
        unpack_codes(heap, n_elements, kind, itemsize=shape.itemsize)


def unpack_for_forward(heap: Heap, shape: LayerShape, linear: LinearFacts, n_rows: int) -> None:
    """Unpack for y = x W before y is there; where weights are mixed, y is included."""
    if shape.mixed:
        mixed_forward(heap, shape, linear, n_rows)
    else:
        unpack_matrix(heap, shape, linear)


def unpack_for_backward(heap: Heap, shape: LayerShape, linear: LinearFacts, n_rows: int) -> None:
    """Unpack for dx before it is there; where weights are mixed, dx is included."""
    if shape.mixed:
        mixed_backward(heap, shape, linear, n_rows)
    else:
        unpack_matrix(heap, shape, linear)


def lora_forward(heap: Heap, shape: LayerShape, linear: LinearFacts, n_rows: int) -> None:
    """Take what LoRA adds to a forward once y is there: the dropped input, x A, and A and B in the compute dtype."""
    c, r = shape.itemsize, shape.rank
    with heap.call():
        if shape.dropout:
            heap.touch(2 * n_rows * linear.in_features * c)
            heap.take(n_rows * linear.in_features * c)
        low = n_rows * r * c
        heap.touch(low + (max(linear.in_features, linear.out_features) * r * c if c != 4 else 0))


def lora_backward(heap: Heap, shape: LayerShape, linear: LinearFacts, n_rows: int, *, need_x: bool) -> None:
    """Take what LoRA adds to a backward once dx is there: dA and dB."""
    c, r, n_in, n_out = shape.itemsize, shape.rank, linear.in_features, linear.out_features
    cast, apart = c != 4, adds_apart(itemsize=shape.itemsize, widens=shape.kind.widens_products)
    with heap.call():
        if shape.dropout:
            heap.take(2 * n_rows * n_in * c)  # the mask, and the dropped input
        heap.take(n_in * r * c if cast else 0)
        heap.touch(n_out * r * c * cast + n_rows * r * c)
        heap.take(n_rows * r * c)  # g B^T
        heap.touch(n_in * r * (c + 4) * apart)
        heap.take(n_in * r * 4)  # dA
        heap.touch(n_rows * r * c + n_out * r * (4 + c * apart))
        heap.take(n_out * r * 4)  # dB
        if shape.dropout and need_x:
            heap.take(n_rows * n_in * c)


# quant/mixed.py --------------------------------------------------------------------------------------------------------


def mixed_elements(linear: LinearFacts) -> int:
    """The number of elements of one matrix' block where weights are mixed."""
    return rows_at_once(linear.out_features, linear.in_features) * linear.in_features


def _mixed_rows(heap: Heap, shape: LayerShape, linear: LinearFacts) -> None:
    """Read blocks of rows: both matrices' scales stay; where no rows can be cut out they are made at each read instead."""
    if linear.in_features % BLOCK_ELEMENTS == 0 and shape.facts.forms is None:
        for _ in range(2):
            unpack_scales(heap, linear.in_features * linear.out_features, shape.kind)


def _mixed_read(heap: Heap, shape: LayerShape, linear: LinearFacts) -> None:
    if linear.in_features % BLOCK_ELEMENTS:
        unpack_matrix(heap, shape, linear)
    elif shape.facts.forms is None:
        unpack_codes(heap, mixed_elements(linear), shape.kind, itemsize=shape.itemsize)


def mixed_forward(heap: Heap, shape: LayerShape, linear: LinearFacts, n_rows: int) -> None:
    """Take what a forward with a mixture of two weights needs, y included."""
    with heap.call():
        _mixed_rows(heap, shape, linear)
        heap.take(n_rows * linear.out_features * shape.itemsize)
        _mixed_read(heap, shape, linear)


def mixed_backward(heap: Heap, shape: LayerShape, linear: LinearFacts, n_rows: int) -> None:
    """Take what a backward with a mixture of two weights needs: dx, and a block's gradient."""
    with heap.call():
        _mixed_rows(heap, shape, linear)
        heap.take(n_rows * linear.in_features * shape.itemsize)
        _mixed_read(heap, shape, linear)
        heap.touch(mixed_elements(linear) * (shape.itemsize + 4 * (shape.itemsize != 4)))


def _tile_sizes(shape: LayerShape, n_tokens: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """The queries and keys of the last two tiles, and the heads that share keys.

    No earlier tile takes more: of whole tiles the last one sees the most keys. There may be a million of them.
    """
    group = shape.layer.n_heads // shape.layer.n_kv_heads
    n_tile = _tile_queries(n_tokens, group=group, device_type=shape.device_type)
    for start in range(0, n_tokens, n_tile)[-2:]:
        n, m = (part.stop - part.start for part in _tile(start, n_tile, n_tokens, n_tokens, window))
        yield n, m, group


def attention_forward(heap: Heap, shape: LayerShape, n_tokens: int, window: int | None) -> None:
    """Take what attention in tiles of queries needs in the forward; a tile's masks are never the most: a byte a score of
    one head."""
    c, head_dim = shape.itemsize, shape.layer.head_dim
    for n, m, group in _tile_sizes(shape, n_tokens, window):
        scores = group * n * m
        if shape.facts.family.sinks:  # in a column of their own
            heap.touch(2 * group * n * (m + 1) * c)  # scores, and their softmax
            heap.touch(group * n * (m + 1 + head_dim) * c)
            continue
        heap.touch(scores * (c + 4 * (c != 4) + 4))  # scores, in fp32, and their softmax
        heap.touch((scores + group * n * head_dim) * c)


def attention_backward(heap: Heap, shape: LayerShape, n_tokens: int, window: int | None) -> None:
    """Take what attention in tiles of queries needs in the backward."""
    c, head_dim = shape.itemsize, shape.layer.head_dim
    cast = c != 4
    with heap.call():
        heap.take(2 * n_tokens * head_dim * 4)  # sums over tiles
        for n, m, group in _tile_sizes(shape, n_tokens, window):
            scores, product = group * n * m, m * head_dim * c
            if shape.facts.family.sinks:
                whole = group * n * (m + 1) * c
                heap.touch(3 * whole)  # softmax, its gradient, that of the scores
                heap.touch(whole + max(product, group * n * head_dim * c))
                continue
            heap.touch(scores * (2 * c + 4 * cast + 4))  # tanh, scores, in fp32, and their softmax
            heap.touch(scores * (c + 4 + c * cast) + product)
            heap.touch(scores * (c + 12 + c * cast))  # tanh, softmax and its gradients
            heap.touch(scores * c + max(product, group * n * head_dim * c))


# run/model/sequences.py ------------------------------------------------------------------------------------------------


def _sequence_mask(heap: Heap, shape: LayerShape, n_tokens: int, window: int | None) -> int:
    """Take what makes the mask of a sequence that is longer than the window; returns the bytes of the mask."""
    if window is None or n_tokens <= window:
        return 0
    heap.touch(n_tokens * n_tokens * (1 + shape.itemsize))
    return n_tokens * n_tokens * shape.itemsize


def sequence_forward(heap: Heap, shape: LayerShape, n_tokens: int, window: int | None) -> None:
    """Take what the kernel gives for one sequence of a row: its output, and the logarithms of sums in fp32."""
    layer, mask = shape.layer, _sequence_mask(heap, shape, n_tokens, window)
    heap.touch(mask + n_tokens * layer.n_heads * (layer.head_dim * shape.itemsize + 4))


def sequence_backward(heap: Heap, shape: LayerShape, n_tokens: int, window: int | None) -> None:
    """Take what the kernel gives for one sequence of a row: the gradients of queries, keys and values."""
    layer, mask = shape.layer, _sequence_mask(heap, shape, n_tokens, window)
    heap.touch(mask + n_tokens * (layer.n_heads + 2 * layer.n_kv_heads) * layer.head_dim * shape.itemsize)


# run/model/chunks.py ---------------------------------------------------------------------------------------------------


def chunk_states(state: int, n_tokens: int, *, backward: bool) -> int:
    """The bytes of a recurrence's states, of `state` bytes each, that live while a chunk runs, its result left out.

    A backward keeps the state at the beginning of each group of chunks, those within the group at hand, and the gradient of
    one.
    """
    if not backward:
        return state
    n_chunks = ceil(n_tokens / DELTA_CHUNK)
    n_groups = ceil(n_chunks / DELTA_STATES_APART)
    n_last = n_chunks - (n_groups - 1) * DELTA_STATES_APART
    return state * (n_groups + max(n_last, DELTA_STATES_APART - 1 if n_groups > 1 else 0))


# quant/gated_mlp.py ----------------------------------------------------------------------------------------------------


class _Pass:
    """The counterpart of gated_mlp._Pass, taken on the heap when made. `ranks` of gate, up and down are 0 where there is no
    LoRA."""

    def __init__(self, heap: Heap, shape: LayerShape, n_rows: int) -> None:
        self.heap, self.shape, self.c = heap, shape, shape.itemsize
        self.hidden, self.kind = shape.facts.hidden_size, shape.kind
        self.width = min(shape.pieces.features, shape.layer.inner)
        self.tile = min(shape.pieces.tokens, n_rows)
        self.is_whole = self.width == shape.layer.inner
        self.apart = adds_apart(itemsize=self.c, widens=self.kind.widens_products)
        self.linears = mlp_linears(shape)
        self.ranks = [shape.rank if linear.short_name in shape.targets else 0 for linear in self.linears]
        for linear in self.linears if shape.facts.forms is None else ():
            unpack_scales(heap, linear.in_features * linear.out_features, self.kind)
        heap.take(self.adapter_elements * self.c if self.c != 4 else 0)
        heap.take(n_rows * (self.ranks[0] + self.ranks[1]) * self.c)

    @property
    def adapter_elements(self) -> int:
        return sum((m.in_features + m.out_features) * rank for m, rank in zip(self.linears, self.ranks, strict=True))

    def weights(self) -> None:
        """Take a block's three matrices; columns of the last one are cut out as copies (unless they are all of them)."""
        n_elements = self.width * self.hidden
        if self.shape.facts.forms is not None:
            return
        unpack_codes(self.heap, n_elements, self.kind, itemsize=self.c)
        with self.heap.call():
            if self.width < self.shape.layer.inner:
                self.heap.take(n_elements // 2 + 4 * n_elements // BLOCK_ELEMENTS)
            unpack_codes(self.heap, n_elements, self.kind, itemsize=self.c)


def mlp_linears(shape: LayerShape) -> list[LinearFacts]:
    """The linear layers of the MLP: gate, up and down."""
    by_name = {linear.short_name: linear for linear in shape.linears}
    return [by_name[name] for name in ("gate_proj", "up_proj", "down_proj")]


def mlp_forward(heap: Heap, shape: LayerShape, n_rows: int) -> None:
    """Take what a forward of the MLP in blocks needs (quant/gated_mlp.py)."""
    with heap.call():
        run = _Pass(heap, shape, n_rows)
        c, hidden, down_rank = run.c, run.hidden, run.ranks[2]
        cast = c != 4
        heap.take(n_rows * (hidden + down_rank) * (c if run.is_whole else 4))
        run.weights()
        inner = run.tile * run.width * c
        heap.touch((3 if shape.pieces.joined and not shape.gates_in_place else 2) * inner)
        if run.is_whole:
            return
        still = inner * (1 + (shape.gates_in_place and shape.pieces.joined))  # a half keeps the whole
        heap.touch(still + run.tile * max(hidden, down_rank) * c * run.apart)
        heap.touch(n_rows * (down_rank * cast + hidden * run.apart) * c if down_rank else 0)
        heap.touch(n_rows * hidden * c if cast else 0)


def mlp_backward(heap: Heap, shape: LayerShape, n_rows: int, *, need_x: bool) -> None:
    """Take what a backward of the MLP in blocks needs; `need_x`: the gradient of its input is made."""
    with heap.call():
        run = _Pass(heap, shape, n_rows)
        c, hidden, (gate_rank, up_rank, down_rank) = run.c, run.hidden, run.ranks
        cast, rank = c != 4, max(run.ranks)
        heap.take(run.adapter_elements * 4)
        heap.take(n_rows * hidden * 4 if need_x else 0)
        heap.take(n_rows * (down_rank * c + down_rank * 4 + (gate_rank + up_rank) * 4))
        run.weights()
        inner = run.tile * run.width * c
        heap.touch((3 if shape.gates_in_place else 6) * inner)
        with_factors = 5 if shape.pieces.joined else 4  # gate and up go together, or gate before up
        with_factors = 3 if shape.gates_in_place else with_factors
        most = max(run.tile, run.width)
        heap.touch(with_factors * inner + most * down_rank * c * run.apart)
        heap.touch(2 * inner + max(most * max(gate_rank, up_rank), run.tile * hidden * need_x) * c * run.apart)
        low = n_rows * max(gate_rank, up_rank) * c if cast else 0
        earlier = low if gate_rank and up_rank else 0  # the loop's variable
        heap.touch(earlier + low + max(hidden * rank, n_rows * hidden * need_x) * c * run.apart)
        heap.take(low)
        heap.touch((n_rows * cast + hidden * run.apart) * down_rank * c)
        heap.touch(n_rows * hidden * c if need_x and cast else 0)


# The family's own MLP, y = down(act(gate(x)) * up(x)): with dropout, and where widths are no multiples of 64 --------------


@dataclass(frozen=True)
class _Plain:
    """The family's own MLP. `x_trains`: x needs a gradient. Then all does; else what lies behind a layer with LoRA."""

    shape: LayerShape
    n_rows: int
    x_trains: bool

    @property
    def inner(self) -> int:
        """The bytes of a tensor of intermediate features."""
        return self.n_rows * self.shape.layer.inner * self.shape.itemsize

    def trains(self, linear: LinearFacts) -> bool:
        return self.x_trains or self.shape.saves(linear.short_name)

    def forward(self, heap: Heap, linear: LinearFacts) -> None:
        """Take what one linear layer's forward needs, its result included."""
        with heap.call():
            unpack_for_forward(heap, self.shape, linear, self.n_rows)
        with heap.call():
            heap.take(self.n_rows * linear.out_features * self.shape.itemsize)
            if linear.short_name in self.shape.targets:
                lora_forward(heap, self.shape, linear, self.n_rows)

    def backward(self, heap: Heap, linear: LinearFacts, *, need_x: bool) -> None:
        """Take what one linear layer's backward needs, its result included."""
        with heap.call():
            if need_x:
                unpack_for_backward(heap, self.shape, linear, self.n_rows)
                heap.take(self.n_rows * linear.in_features * self.shape.itemsize)
            if linear.short_name in self.shape.targets:
                lora_backward(heap, self.shape, linear, self.n_rows, need_x=need_x)


def plain_mlp_forward(heap: Heap, shape: LayerShape, n_rows: int, *, graph: bool, value: bool, x_trains: bool) -> int:
    """Take what a forward of the family's own MLP needs, and return the bytes that stay for the backward; x is not among
    them where it is not saved (the program counts it)."""
    run, (gate, up, down) = _Plain(shape, n_rows, x_trains), mlp_linears(shape)
    gate_kept, up_kept = (graph and run.trains(linear) for linear in (gate, up))
    down_kept, x_kept = graph and shape.saves("down_proj"), shape.saves("gate_proj") or shape.saves("up_proj")
    with heap.call():
        run.forward(heap, gate)
        heap.take(2 * run.inner)  # gate(x) and its activation
        heap.free(0 if gate_kept else run.inner)
        run.forward(heap, up)
        heap.take(2 * run.inner)  # up(x) and the product
        heap.free(run.inner * ((not up_kept) + (not gate_kept)))  # the activation serves up's gradient, up(x) gate's
        if value:
            run.forward(heap, down)
    x = n_rows * shape.facts.hidden_size * shape.itemsize
    return run.inner * (2 * gate_kept + up_kept + down_kept) - (x if graph and not x_kept else 0)


def plain_mlp_backward(heap: Heap, shape: LayerShape, n_rows: int, *, x_trains: bool, paged: bool, given: int = 0) -> None:
    """Take what a backward of the family's own MLP needs. What it keeps (`plain_mlp_forward`) goes inside, too, unless it
    is `paged`; so do `given` bytes of its gradient."""
    run, (gate, up, down) = _Plain(shape, n_rows, x_trains), mlp_linears(shape)
    x, inner, held = n_rows * shape.facts.hidden_size * shape.itemsize, run.inner, 0 if paged else run.inner
    gate_trains, up_trains = run.trains(gate), run.trains(up)
    with heap.call():
        run.backward(heap, down, need_x=gate_trains or up_trains)
        heap.free(given)
        heap.take(inner * (gate_trains or up_trains))  # the product's gradient
        heap.free(held * shape.saves("down_proj"))
        heap.take(inner * (gate_trains + up_trains))  # those of both factors
        heap.free(inner * (gate_trains or up_trains), held * (gate_trains + up_trains))
        if up_trains:
            run.backward(heap, up, need_x=x_trains)
            heap.take(x * x_trains - inner)
        if gate_trains:
            heap.take(inner)  # the activation's gradient
            heap.free(inner, held)
            run.backward(heap, gate, need_x=x_trains)
            heap.free(inner)
            heap.touch(2 * x * x_trains)
