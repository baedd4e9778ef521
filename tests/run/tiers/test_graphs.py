"""One layer's graph whose saved tensors move (run/tiers/graphs.py): its gradients equal those of a graph that stays."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lopt_edge.run.tiers.graphs import LayerGraph
from lopt_edge.run.tiers.moves import Mover
from tests.run.tiers.movers import TIERS, make_mover


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[Mover]:
    made = make_mover(tmp_path)
    yield made
    made.close()


# one layer's graph ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer in miniature: a frozen norm, a table that belongs to all layers, a low-rank branch that trains."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.norm = nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
        self.a = nn.Parameter(torch.randn(width, 2, generator=generator))
        self.b = nn.Parameter(torch.randn(2, width, generator=generator))
        self.table = torch.randn(6, width, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden * self.norm * self.table
        x = torch.nn.functional.gelu((x @ self.a) @ self.b).softmax(-1)
        return hidden + x[:, ::2].repeat_interleave(2, dim=1) * x


HIDDEN = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
GRAD = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))


def run_forward(layer: Layer, mover: Mover, *, movable: bool, needs_gradient: bool = True) -> tuple[LayerGraph, Tensor]:
    graph = LayerGraph(mover, movable=movable, constants=[layer.table])
    with torch.enable_grad(), graph.recording():
        output = graph.end(layer(graph.begin(HIDDEN, needs_gradient=needs_gradient)))
    return graph, output


def run_backward(layer: Layer, graph: LayerGraph) -> list[Tensor | None]:
    graph.feed(GRAD.clone())
    found = [graph.backward(), layer.a.grad, layer.b.grad]
    layer.a.grad = layer.b.grad = None
    return found


def plain_autograd() -> list[Tensor]:
    layer, leaf = Layer(), HIDDEN.clone().requires_grad_()
    layer(leaf).backward(GRAD)
    return [leaf.grad, layer.a.grad, layer.b.grad]


@pytest.mark.parametrize("movable", [False, True])
def test_a_graph_gives_the_gradients_of_plain_autograd(mover, movable):
    layer = Layer()
    graph, output = run_forward(layer, mover, movable=movable)
    assert torch.equal(output, layer(HIDDEN)) and not output.requires_grad
    for ours, theirs in zip(run_backward(layer, graph), plain_autograd(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("seconds", [0.0, 0.002])
def test_pages_out_and_in_change_no_bit(tmp_path, tier, seconds):
    """Two layers' pages at once, with memory in between that others use; every stage held up."""
    mover = make_mover(tmp_path, delay=lambda stage: time.sleep(seconds))
    layers = [Layer(), Layer()]
    graphs = []
    for layer in layers:
        graph, _ = run_forward(layer, mover, movable=True)
        n_bytes = graph.page_bytes
        assert n_bytes > 0
        graph.page_out(tier)
        graphs.append(graph)
    for graph in graphs:
        graph.wait()
        assert graph.page_bytes == 0
    scribble = [torch.full((6, 8), 9.0) for _ in range(50)]
    for graph in graphs:
        graph.page_in()
    for layer, graph in zip(layers, graphs, strict=True):
        graph.wait()
        assert graph.page_bytes == n_bytes
        for ours, theirs in zip(run_backward(layer, graph), plain_autograd(), strict=True):
            assert torch.equal(ours, theirs)
        graph.free()
    assert mover.page_file.used_bytes == mover.pinned.used_bytes == 0 and len(scribble) == 50
    mover.close()


@pytest.mark.parametrize("state", ["on its way out", "below", "on its way in"])
def test_a_page_that_is_not_there_raises(mover, state):
    """Never fetched silently; and the next try, with its pages in, is as good as the first would have been."""
    layer = Layer()
    graph, _ = run_forward(layer, mover, movable=True)
    graph.page_out("disk")
    if state != "on its way out":
        graph.wait()
    if state == "on its way in":
        graph.page_in()
    graph.feed(GRAD.clone())
    with pytest.raises(RuntimeError, match="not on the device"):
        graph.backward()
    graph.free()
    assert mover.page_file.used_bytes == 0


def test_a_storage_is_one_page_however_often_it_is_saved(mover):
    """Views come back as views of the same memory, with their strides."""
    leaf = torch.arange(24.0).view(4, 6)
    graph = LayerGraph(mover, movable=True)
    weight = nn.Parameter(torch.ones(4, 6))
    with torch.enable_grad(), graph.recording():
        hidden = graph.begin(leaf, needs_gradient=False)
        output = (hidden * weight).sum() + (hidden[1:, ::2] * weight[1:, ::2]).sum() + (hidden.t() * weight.t()).sum()
        graph.end(output)
    assert len(graph.pages) == 1 and graph.page_bytes == leaf.nbytes
    graph.page_out("disk")
    graph.wait()
    graph.page_in()
    graph.wait()
    graph.feed(torch.ones(()))
    graph.backward()
    expected = 2 * leaf.clone()
    expected[1:, ::2] += leaf[1:, ::2]
    assert torch.equal(weight.grad, expected)


def test_parameters_and_constants_are_not_paged(mover):
    """Trained or frozen, the layers' own and what all of them share: paging it would free nothing."""
    layer = Layer()
    graph, _ = run_forward(layer, mover, movable=True)
    own = {tensor.untyped_storage()._cdata for tensor in (layer.norm, layer.a, layer.b, layer.table)}
    assert not own & set(graph.pages)
    unknown = LayerGraph(mover, movable=True)
    with torch.enable_grad(), unknown.recording():
        unknown.end(layer(unknown.begin(HIDDEN, needs_gradient=True)))
    assert layer.table.untyped_storage()._cdata in unknown.pages, "a constant that is not named is a page like others"


def test_a_graph_that_does_not_move_has_no_pages(mover):
    graph, _ = run_forward(Layer(), mover, movable=False)
    assert not graph.pages and graph.page_bytes == 0


def test_a_frozen_input_gets_no_gradient(mover):
    layer = Layer()
    graph, _ = run_forward(layer, mover, movable=True, needs_gradient=False)
    found = run_backward(layer, graph)
    assert found[0] is None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1:], plain_autograd()[1:], strict=True))


def test_a_graph_is_run_backward_once_and_with_a_gradient(mover):
    layer = Layer()
    graph, _ = run_forward(layer, mover, movable=True)
    with pytest.raises(RuntimeError, match="no gradient to begin with"):
        graph.backward()
    graph, _ = run_forward(layer, mover, movable=True)
    run_backward(layer, graph)
    graph.feed(GRAD)
    with pytest.raises(RuntimeError, match="was not ended"):
        graph.backward()


@pytest.mark.parametrize("movable", [False, True])
def test_neither_input_nor_output_is_held(mover, movable):
    """They belong to the step; the graph holds what autograd saved and nothing else (this layer saves neither)."""
    layer, hidden = Layer(), HIDDEN.clone()
    graph = LayerGraph(mover, movable=movable, constants=[layer.table])
    with torch.enable_grad(), graph.recording():
        output = graph.end(layer(graph.begin(hidden, needs_gradient=True)))
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (hidden, output)]
    assert not any(storage.expired() for storage in storages)
    del hidden, output
    gc.collect()
    assert all(storage.expired() for storage in storages)
    for ours, theirs in zip(run_backward(layer, graph), plain_autograd(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tier", TIERS)
def test_pages_are_let_go_once_they_are_out(mover, tier):
    graph, _ = run_forward(Layer(), mover, movable=True)
    storages = [StorageWeakRef(offloaded.tensor.untyped_storage()) for offloaded in graph.pages.values()]
    graph.page_out(tier)
    assert not any(storage.expired() for storage in storages)
    graph.wait()
    deadline = time.monotonic() + 5  # a worker may hold its last job for a moment longer
    while not all(storage.expired() for storage in storages) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert all(storage.expired() for storage in storages)
