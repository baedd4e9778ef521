"""The formulas of plan/costs/module_bytes.py against our modules, tensor by tensor: the same bytes at the worst moment
of a call.

Each test runs one call of a real module under the tracker (run/watch/tracker.py) and the formula for the same sizes on a
heap; they must agree to the byte. Sizes lie on both sides of every chunk, block and tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lopt_edge.plan.costs import module_bytes
from lopt_edge.plan.costs.module_bytes import Heap
from lopt_edge.plan.costs.shape import LayerShape, Vocabularies
from lopt_edge.plan.costs.vocabulary_bytes import gather_rows
from lopt_edge.plan.facts.device_kinds import CPU as CPU_KIND
from lopt_edge.plan.facts.layers import LinearFacts
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.run.model.vocabulary import Vocabulary
from lopt_edge.run.tiers.graphs import LayerGraph
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.run.watch.tracker import MemoryTracker
from quant import mixed as mixed_module
from quant import nf4
from quant.gated_mlp import PackedGatedMLP
from quant.headers import read_header
from quant.linear import DropoutClock, PackedLinear, UnpackBuffer
from quant.mixed import Mixture
from quant.nf4 import PackedWeight, pack, unpack_part, unpack_scales
from quant.sizes import PIECES, MlpPieces

DTYPES = [torch.float32, torch.bfloat16]
RANK = 4
SCALARS = 64  # bytes: single numbers, which nobody predicts
MLP = ("gate_proj", "up_proj", "down_proj")
SOME_MLP = [MLP, ("gate_proj",), ("up_proj",), ("down_proj",), ("gate_proj", "down_proj"), ("gate_proj", "up_proj"), ()]


def measured(call: Callable[[], Any], *given: Tensor | None) -> tuple[int, int]:
    """(the most on top of what is `given`, what is left of it with the result alive)."""
    call()  # tables and buffers that last are made
    tracker = MemoryTracker()
    with tracker:
        tracker.watch(tensor for tensor in given if tensor is not None)
        before = tracker.live_bytes
        result = call()
        assert result is not None
        return tracker.peak_bytes - before, tracker.live_bytes - before


def make_shape(
    dtype: torch.dtype,
    *,
    hidden: int = 128,
    inner: int = 192,
    targets: tuple[str, ...] = MLP,
    dropout: bool = False,
    pieces: MlpPieces = PIECES,
) -> LayerShape:
    config = {"model_type": "llama", "vocab_size": 99, "hidden_size": hidden, "intermediate_size": inner,
              "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    facts = facts_from_config(config, where="here")
    return LayerShape(facts, dtype.itemsize, RANK, targets, dropout=dropout, pieces=pieces)


def make_linear(facts: LinearFacts, shape: LayerShape, buffer: UnpackBuffer) -> PackedLinear:
    """As run/model/load.py and run/model/lora.py make it."""
    layer = PackedLinear(facts.in_features, facts.out_features, buffer=buffer)
    layer.weight = pack(torch.randn(facts.out_features, facts.in_features))
    if facts.bias:
        layer.bias = torch.randn(facts.out_features).to(torch.float32 if shape.itemsize == 4 else torch.bfloat16)
    if facts.short_name in shape.targets:
        a, b = torch.randn(facts.in_features, shape.rank), torch.randn(shape.rank, facts.out_features)
        layer.attach(nn.Parameter(a), nn.Parameter(b), scale=2.0)
        layer.dropout_rate, layer.clock = 0.1 * shape.dropout, DropoutClock(active=True)
    return layer


def tensors(*modules: nn.Module) -> list[Tensor]:
    """What lies in the modules, the unpack buffer too."""
    found: list[Tensor] = []
    for linear in (module for module in nn.ModuleList(modules).modules() if isinstance(module, PackedLinear)):
        weight = linear.weight
        found += [weight.codes, weight.absmax, weight.code_map, weight.nested_absmax, weight.nested_map, weight.offset]
        found += [*linear.parameters(), *([] if linear.bias is None else [linear.bias]), *linear.buffer.flat.values()]
    return found


# quant/nf4.py ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 64, 4096, 8192 + 64])  # of 128: up to two chunks and a bit
def test_unpacking_takes_scales_and_one_chunk(n_rows, dtype):
    shape, packed = make_shape(dtype), pack(torch.randn(n_rows, 128))
    out = torch.empty(n_rows, 128, dtype=dtype)
    whole = Heap()
    module_bytes.unpack_matrix(whole, shape, LinearFacts("x", 128, n_rows, bias=False))
    weight = tensors_of(packed)
    assert measured(lambda: nf4.unpack_into(packed, out), out, *weight) == (whole.peak, 0)
    scales = Heap()
    module_bytes.unpack_scales(scales, n_rows * 128, CPU_KIND)
    assert measured(lambda: unpack_scales(packed), *weight) == (scales.peak, scales.live)
    given, codes = unpack_scales(packed), Heap()
    module_bytes.unpack_codes(codes, n_rows * 128, CPU_KIND, itemsize=dtype.itemsize)
    rows = slice(0, n_rows)
    assert measured(lambda: unpack_part(packed, given, out, rows=rows), out, given, *weight)[0] == codes.peak
    assert whole.peak == max(scales.peak, scales.live + codes.peak)


def tensors_of(packed: PackedWeight) -> list[Tensor | None]:
    return [packed.codes, packed.absmax, packed.code_map, packed.nested_absmax, packed.nested_map, packed.offset]


# quant/linear.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out", "n_rows"), [(128, 192, 7), (192, 64, 300), (64, 8256, 5), (1024, 1024, 40)])
def test_a_linear_layer(n_in, n_out, n_rows, dtype, with_lora, dropout):
    facts = LinearFacts("self_attn.x_proj", n_in, n_out, bias=n_rows == 7)
    shape = make_shape(dtype, targets=("x_proj",) if with_lora else (), dropout=dropout)
    layer = make_linear(facts, shape, UnpackBuffer())
    x, g = torch.randn(n_rows, n_in).to(dtype), torch.randn(n_rows, n_out).to(dtype)
    layer(x)  # makes the buffer
    forward = Heap()
    module_bytes.unpack_matrix(forward, shape, facts)
    y_bytes = forward.take(n_rows * n_out * dtype.itemsize)
    if with_lora:
        module_bytes.lora_forward(forward, shape, facts, n_rows)
    assert measured(lambda: layer(x), x, *tensors(layer)) == (forward.peak, y_bytes)
    for need_x in [False, True] if with_lora else [True]:
        found = backward_bytes(layer, x, g, need_x=need_x)
        heap = Heap()
        if need_x:
            module_bytes.unpack_matrix(heap, shape, facts)
            heap.take(n_rows * n_in * dtype.itemsize)
        if with_lora:
            module_bytes.lora_backward(heap, shape, facts, n_rows, need_x=need_x)
        left = heap.live + (4 * shape.rank * (n_in + n_out) if with_lora else 0)
        assert found == (heap.peak, left), f"need_x={need_x}"


def backward_bytes(module: nn.Module, x: Tensor, g: Tensor, *, need_x: bool) -> tuple[int, int]:
    """As `measured`, of the backward alone; what the forward saved is not counted."""
    x = x.clone().requires_grad_(need_x)
    wanted = [*([x] if need_x else []), *module.parameters()]
    y = module(x)
    return measured(lambda: torch.autograd.grad(y, wanted, g, retain_graph=True), x, g, y, *tensors(module))


# quant/mixed.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), [(128, 192), (1024, 1500), (96, 64)])  # a block, two, and one that is not cut
def test_a_mixture_takes_blocks_of_rows(n_in, n_out, dtype):
    shape, facts = make_shape(dtype, targets=()), LinearFacts("x", n_in, n_out, bias=False)
    buffer = UnpackBuffer()
    before, after, mixed = (make_linear(facts, shape, buffer) for _ in range(3))
    mixed.weight, mixed.synthesis = None, Mixture(before, after, nn.Parameter(torch.tensor([0.5, 0.2])))
    x, g = torch.randn(7, n_in, dtype=dtype), torch.randn(7, n_out, dtype=dtype)
    forward, backward = Heap(), Heap()
    module_bytes.mixed_forward(forward, shape, facts, 7)
    module_bytes.mixed_backward(backward, shape, facts, 7)
    with torch.no_grad():
        mixed(x)  # makes the buffer
        given = [x, g, *tensors(before, after)]
        assert measured(lambda: mixed_module._product(mixed, x), *given)[0] == forward.peak
        peak, _ = measured(lambda: mixed_module._gradients(mixed, x, g), *given)
    assert 0 <= peak - backward.peak <= SCALARS
    assert buffer.flat[torch.device("cpu"), dtype].numel() == 2 * module_bytes.mixed_elements(facts)


# quant/gated_mlp.py ----------------------------------------------------------------------------------------------------


def make_mlp(shape: LayerShape) -> PackedGatedMLP:
    buffer = UnpackBuffer()
    linears = (make_linear(facts, shape, buffer) for facts in module_bytes.mlp_linears(shape))
    return PackedGatedMLP(*linears, act_fn=nn.SiLU(), pieces=shape.pieces)


LARGE_MLP = [(MLP, 192, 1024, 1024), (MLP, 576, 1088, 1025)]  # exactly a block and a tile; both, and more than one chunk


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("targets", "hidden", "inner", "n_rows"),
    [
        *((targets, 128, 1088, 70) for targets in SOME_MLP),
        (MLP, 64, 128, 3),  # one block, one tile
        (MLP, 128, 192, 1500),  # two tiles
        (("down_proj",), 640, 64, 2100),  # narrower than the hidden states
    ],
)
def test_the_blocked_mlp(targets, hidden, inner, n_rows, dtype):
    check_mlp(make_shape(dtype, hidden=hidden, inner=inner, targets=targets), n_rows)


# slow in bfloat16 on many a CPU, where the blocks and the tiles of the others are
@pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.long)])
@pytest.mark.parametrize(("targets", "hidden", "inner", "n_rows"), LARGE_MLP)
def test_the_large_blocked_mlp(targets, hidden, inner, n_rows, dtype):
    check_mlp(make_shape(dtype, hidden=hidden, inner=inner, targets=targets), n_rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [MlpPieces(128, 32, joined=True), MlpPieces(192, 32), MlpPieces(192, 32, joined=True)])
@pytest.mark.parametrize("targets", [MLP, ("up_proj",), ()])
def test_other_pieces_of_the_mlp(targets, pieces, dtype):
    check_mlp(make_shape(dtype, inner=192, targets=targets, pieces=pieces), 70)


def check_mlp(shape: LayerShape, n_rows: int) -> None:
    dtype, hidden, targets = DTYPES[shape.itemsize == 2], shape.facts.hidden_size, shape.targets
    mlp = make_mlp(shape)
    x, g = (torch.randn(n_rows, hidden).to(dtype) for _ in range(2))
    mlp(x)
    heap = Heap()
    module_bytes.mlp_forward(heap, shape, n_rows)
    assert measured(lambda: mlp(x), x, *tensors(mlp)) == (heap.peak, x.nbytes)
    assert heap.live == 0
    for need_x in [False, True] if targets and n_rows < 1025 else [True]:  # more rows: the same once more, slowly
        heap = Heap()
        module_bytes.mlp_backward(heap, shape, n_rows, need_x=need_x)
        gradients = sum(4 * parameter.numel() for parameter in mlp.parameters())
        found = backward_bytes(mlp, x, g, need_x=need_x)
        assert found == (heap.peak, gradients + x.nbytes * need_x), f"need_x={need_x}"


@pytest.mark.parametrize("x_trains", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inner"), [(128, 448), (448, 64)])
@pytest.mark.parametrize("targets", [targets for targets in SOME_MLP if targets])
def test_the_plain_mlp(targets, hidden, inner, dtype, x_trains):
    """With dropout the three linear layers run one after the other, their intermediate whole."""
    shape, n_rows = make_shape(dtype, hidden=hidden, inner=inner, targets=targets, dropout=True), 90
    mlp = make_mlp(shape)
    for parameter in mlp.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, g = (torch.randn(n_rows, hidden).to(dtype) for _ in range(2))
    mlp(x)  # makes the buffer
    lasting = [x, g, *tensors(mlp), *(parameter.grad for parameter in mlp.parameters())]
    forward, backward, tracker = Heap(), Heap(), MemoryTracker()
    kept = module_bytes.plain_mlp_forward(forward, shape, n_rows, graph=True, value=True, x_trains=x_trains)
    kept += 0 if {"gate_proj", "up_proj"} & set(targets) else x.nbytes  # it counts x as released, which we hold
    module_bytes.plain_mlp_backward(backward, shape, n_rows, x_trains=x_trains, paged=False)
    with tracker:
        tracker.watch(lasting)
        graph, before = LayerGraph(Mover(torch.device("cpu"))), tracker.live_bytes
        y = graph.end(mlp(graph.begin(x, needs_gradient=x_trains)))
        assert tracker.peak_bytes - before == forward.peak
        del y
        assert tracker.live_bytes - before == kept + dtype.itemsize  # a number: the graph's end
        graph.feed(g)
        tracker.start_peak()
        dx = graph.backward()
        assert tracker.peak_bytes - before == kept + backward.peak + 2 * dtype.itemsize
        assert tracker.live_bytes - before == (dx.nbytes if x_trains else 0)


# run/model/vocabulary.py
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("n_ids", [1, 40])
def test_the_rows_of_a_vocabulary(tmp_path, n_ids, stored, dtype, resident):
    save_file({"matrix": torch.randn(99, 128).to(stored)}, tmp_path / "x.safetensors")
    entry = read_header(tmp_path / "x.safetensors")["matrix"]
    vocabulary = Vocabulary(entry, device=torch.device("cpu"), dtype=dtype, resident=resident)
    ids, heap = torch.arange(n_ids), Heap()  # each id its own row: the worst
    gather_rows(heap, make_shape(dtype), n_ids, stored=Vocabularies(stored.itemsize, resident))
    found = measured(lambda: vocabulary.rows(ids), ids, *vocabulary.tensors())
    assert found == (heap.peak, n_ids * 128 * dtype.itemsize)
    assert heap.live == 0
