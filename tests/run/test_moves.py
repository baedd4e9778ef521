"""Movements: what goes down comes back bit for bit, nothing is handed out or let go before `wait`, faults appear there.

Also one layer's graph whose saved tensors move (run/graphs.py): gradients equal those of a graph that stays.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lopt_edge.errors import RunError
from lopt_edge.run.graphs import LayerGraph
from lopt_edge.run.moves import Delay, Mover, Parcel
from lopt_edge.run.page_dir import GRAIN, PageFile

CPU = torch.device("cpu")
TIERS = ("disk", "host")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64)
SHAPES = ((), (1,), (3, 5), (2, 3, 4), (GRAIN,), (GRAIN + 1,), (1, 70_001))


def make_mover(folder: Path, *, delay: Delay | None = None, max_bytes: int | None = None) -> Mover:
    return Mover(CPU, page_file=PageFile(folder, n_bytes=GRAIN, name="moves", max_bytes=max_bytes), delay=delay)


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[Mover]:
    made = make_mover(tmp_path)
    yield made
    made.close()


class Gate:
    """A delay that holds every movement of one stage until it is opened."""

    def __init__(self, stage: str) -> None:
        self.stage, self.event = stage, threading.Event()

    def __call__(self, stage: str) -> None:
        if stage == self.stage:
            assert self.event.wait(10)

    def open(self) -> None:
        self.event.set()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Random bytes (any bit pattern, NaNs included); random truths."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    n_bytes = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def send(mover: Mover, parcel: Parcel, tier: str = "disk") -> None:
    mover.down(parcel, tier)
    mover.wait(parcel)


def bring(mover: Mover, parcel: Parcel) -> Tensor:
    mover.up(parcel)
    mover.wait(parcel)
    return parcel.here()


# parcels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_size_comes_back_bitwise(mover, tier, dtype):
    for shape in SHAPES:
        tensor = random_tensor(shape, dtype)
        expected, parcel = bits(tensor), Parcel(tensor)
        send(mover, parcel, tier)
        assert parcel.tensor is None
        back = bring(mover, parcel)
        assert back is not tensor and (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
        assert bits(back) == expected
        mover.free(parcel)
    assert mover.page_file.used_bytes == mover.pinned.used_bytes == 0


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_not_contiguous_comes_back_so(mover, tier):
    base = torch.arange(60.0).view(4, 15)
    for tensor in (base.t(), base[:, 2:9], base[1:3], base[0].expand(3, 15)):
        parcel = Parcel(tensor)
        send(mover, parcel, tier)
        back = bring(mover, parcel)
        assert torch.equal(back, tensor) and back.is_contiguous()
        mover.free(parcel)
    assert torch.equal(base, torch.arange(60.0).view(4, 15))


@pytest.mark.parametrize("tier", TIERS)
def test_a_changed_tensor_goes_down_again(mover, tier):
    """As optimizer states do in every step: the copy below is replaced, and takes no more room."""
    parcel, used = Parcel(torch.zeros(1000)), []
    for step in range(1, 4):
        send(mover, parcel, tier)
        used.append((mover.page_file.used_bytes, mover.pinned.used_bytes))
        assert torch.equal(bring(mover, parcel), torch.full((1000,), step - 1.0))
        parcel.here().add_(1)
    assert used == [used[0]] * 3
    assert mover.bytes_moved == 3 * 2 * 4000


def test_here_raises_while_a_movement_is_under_way_and_below(tmp_path):
    gates = {stage: Gate(stage) for stage in ("write", "read")}

    def delay(stage: str) -> None:
        gates[stage](stage)

    mover, tensor = make_mover(tmp_path, delay=delay), torch.ones(5)
    parcel = Parcel(tensor)
    assert parcel.here() is tensor
    mover.down(parcel, "disk")
    for ask in (parcel.here, lambda: mover.drop(parcel), lambda: mover.down(parcel, "disk")):
        with pytest.raises(RuntimeError, match="not on the device"):
            ask()
    assert parcel.tensor is tensor, "what is being written stays alive"
    gates["write"].open()
    mover.wait(parcel)
    with pytest.raises(RuntimeError, match="not on the device"):
        parcel.here()
    mover.up(parcel)
    with pytest.raises(RuntimeError, match="not on the device"):
        parcel.here()
    gates["read"].open()
    mover.wait(parcel)
    assert torch.equal(parcel.here(), tensor)
    mover.drop(parcel)
    with pytest.raises(RuntimeError, match="not on the device"):
        parcel.here()
    assert torch.equal(bring(mover, parcel), tensor), "dropping leaves the copy below"
    mover.close()


@pytest.mark.parametrize("tier", TIERS)
def test_the_device_copy_is_let_go_at_wait_and_not_before(mover, tier):
    parcel = Parcel(torch.ones(100))
    alive = weakref.ref(parcel.tensor)
    mover.down(parcel, tier)
    gc.collect()
    assert alive() is not None
    mover.wait(parcel)
    deadline = time.monotonic() + 5  # a worker may hold its last job for a moment longer
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert alive() is None


def test_a_wait_without_a_movement_does_nothing(mover):
    parcel = Parcel(torch.ones(3))
    mover.wait(parcel)
    assert torch.equal(parcel.here(), torch.ones(3))


def test_many_movements_at_once_under_random_delays(tmp_path):
    """More than there are workers, of all sizes, up and down at the same time; memory that was let go is scribbled over."""
    source, lock = torch.Generator().manual_seed(7), threading.Lock()

    def delay(stage: str) -> None:
        with lock:
            seconds = torch.rand((), generator=source).item() ** 4 * 0.01
        time.sleep(seconds)

    mover = make_mover(tmp_path, delay=delay)
    tensors = [random_tensor((1 + 997 * i % 9001,), torch.uint8, seed=i) for i in range(24)]
    parcels = [Parcel(tensor.clone()) for tensor in tensors]
    for first, second in ((parcels[:12], parcels[12:]), (parcels[12:], parcels[:12])):
        for parcel in first:
            mover.down(parcel, "disk")
        for parcel in second:
            if parcel.tensor is None:
                mover.up(parcel)
        for parcel in [*first, *second]:
            mover.wait(parcel)
        scribble = [torch.full_like(tensor, 255) for tensor in tensors]
    for parcel in parcels:
        if parcel.tensor is None:
            mover.up(parcel)
    for parcel, tensor in zip(parcels, tensors, strict=True):
        mover.wait(parcel)
        assert torch.equal(parcel.here(), tensor)
        mover.free(parcel)
    assert mover.page_file.used_bytes == 0 and len(scribble) == 24
    mover.close()


def test_a_plan_that_pages_to_disk_needs_a_page_file():
    with pytest.raises(RuntimeError, match="no page file"):
        Mover(CPU).down(Parcel(torch.ones(2)), "disk")


def test_nothing_comes_up_that_never_went_down(mover):
    with pytest.raises(RuntimeError, match="no copy below"):
        mover.up(Parcel(torch.ones(2)))


def test_closing_waits_for_the_workers_and_may_be_repeated(tmp_path):
    mover = make_mover(tmp_path, delay=lambda stage: time.sleep(0.05))
    parcel = Parcel(torch.ones(5))
    mover.down(parcel, "disk")
    mover.close()
    mover.wait(parcel)  # it was written before the file was closed
    mover.free(parcel)
    mover.close()


# faults ---------------------------------------------------------------------------------------------------------------


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_appears_at_wait_and_loses_nothing(mover, monkeypatch):
    parcel = Parcel(torch.ones(5))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        mover.down(parcel, "disk")
        with pytest.raises(RunError, match=r"(?s)cannot write.*No space.*free some space"):
            mover.wait(parcel)
    assert torch.equal(parcel.here(), torch.ones(5)), "the device copy is there still"
    send(mover, parcel)
    assert torch.equal(bring(mover, parcel), torch.ones(5))
    mover.free(parcel)
    assert mover.page_file.used_bytes == 0


def test_a_failed_read_appears_at_wait(mover):
    parcel = Parcel(torch.ones(5))
    send(mover, parcel)
    os.ftruncate(mover.page_file.fileno(), 0)
    mover.up(parcel)
    with pytest.raises(RunError, match="truncated"):
        mover.wait(parcel)
    with pytest.raises(RuntimeError, match="not on the device"):
        parcel.here()
    mover.wait(parcel)  # the fault is told once
    mover.free(parcel)
    assert mover.page_file.used_bytes == 0


def test_a_full_page_file_is_a_run_error_and_loses_nothing(tmp_path):
    mover = make_mover(tmp_path, max_bytes=GRAIN)
    small, large = Parcel(torch.ones(5)), Parcel(torch.ones(5000))
    send(mover, small)
    with pytest.raises(RunError, match="are allowed"):
        mover.down(large, "disk")
    assert torch.equal(large.here(), torch.ones(5000))
    assert torch.equal(bring(mover, small), torch.ones(5))
    mover.close()


@pytest.mark.parametrize("stage", ["write", "read"])
def test_a_worker_s_own_fault_is_a_run_error(tmp_path, stage):
    def delay(name: str) -> None:
        if name == stage:
            raise OSError(errno.EIO, "Input/output error", "/a/disk")

    mover, parcel = make_mover(tmp_path, delay=delay), Parcel(torch.ones(5))
    with pytest.raises(RunError, match=r"(?s)/a/disk.*Input/output error"):
        send(mover, parcel)
        bring(mover, parcel)
    mover.close()


@pytest.mark.parametrize("direction", ["down", "up"])
def test_free_after_a_fault_is_quiet(mover, monkeypatch, direction):
    """The fault that matters was raised already; what is cleaned up after it must not hide it."""
    parcel = Parcel(torch.ones(5))
    if direction == "up":
        send(mover, parcel)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        patch.setattr(os, "preadv", no_space)
        (mover.up if direction == "up" else lambda p: mover.down(p, "disk"))(parcel)
        mover.free(parcel)
    assert (parcel.tensor, parcel.pending, parcel.offset, parcel.host) == (None,) * 4
    assert mover.page_file.used_bytes == 0
    mover.free(parcel)


def test_free_ends_the_movement_under_way_first(tmp_path):
    """Space that a worker still writes to must not be handed out again."""
    gate = Gate("write")
    mover, parcel, freed = make_mover(tmp_path, delay=gate), Parcel(torch.ones(5)), threading.Event()
    mover.down(parcel, "disk")
    thread = threading.Thread(target=lambda: (mover.free(parcel), freed.set()))
    thread.start()
    assert not freed.wait(0.05)
    assert mover.page_file.used_bytes == GRAIN
    gate.open()
    assert freed.wait(10)
    assert mover.page_file.used_bytes == 0
    thread.join()
    mover.close()


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
    own = {tensor.untyped_storage().data_ptr() for tensor in (layer.norm, layer.a, layer.b, layer.table)}
    assert not own & set(graph.pages)
    unknown = LayerGraph(mover, movable=True)
    with torch.enable_grad(), unknown.recording():
        unknown.end(layer(unknown.begin(HIDDEN, needs_gradient=True)))
    assert layer.table.untyped_storage().data_ptr() in unknown.pages, "a constant that is not named is a page like others"


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
    storages = [StorageWeakRef(parcel.tensor.untyped_storage()) for parcel in graph.pages.values()]
    graph.page_out(tier)
    assert not any(storage.expired() for storage in storages)
    graph.wait()
    deadline = time.monotonic() + 5  # a worker may hold its last job for a moment longer
    while not all(storage.expired() for storage in storages) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert all(storage.expired() for storage in storages)
