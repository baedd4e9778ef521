"""Movements: what goes down comes back bit for bit, nothing is handed out or let go before `wait`, faults appear there."""

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

from lopt_edge.errors import RunError
from lopt_edge.run.tiers.moves import Mover, OffloadedTensor
from lopt_edge.run.tiers.page_file import GRAIN
from tests.run.tiers.movers import CPU, DTYPES, SHAPES, TIERS, Gate, bits, bring, make_mover, random_tensor, send


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[Mover]:
    made = make_mover(tmp_path)
    yield made
    made.close()


# offloaded tensors
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_size_comes_back_bitwise(mover, tier, dtype):
    for shape in SHAPES:
        tensor = random_tensor(shape, dtype)
        expected, offloaded = bits(tensor), OffloadedTensor(tensor)
        send(mover, offloaded, tier)
        assert offloaded.tensor is None
        back = bring(mover, offloaded)
        assert back is not tensor and (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
        assert bits(back) == expected
        mover.free(offloaded)
    assert mover.page_file.used_bytes == mover.pinned.used_bytes == 0


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_not_contiguous_comes_back_so(mover, tier):
    base = torch.arange(60.0).view(4, 15)
    for tensor in (base.t(), base[:, 2:9], base[1:3], base[0].expand(3, 15)):
        offloaded = OffloadedTensor(tensor)
        send(mover, offloaded, tier)
        back = bring(mover, offloaded)
        assert torch.equal(back, tensor) and back.is_contiguous()
        mover.free(offloaded)
    assert torch.equal(base, torch.arange(60.0).view(4, 15))


@pytest.mark.parametrize("tier", TIERS)
def test_a_changed_tensor_goes_down_again(mover, tier):
    """As optimizer states do in every step: the copy below is replaced, and takes no more room."""
    offloaded, used = OffloadedTensor(torch.zeros(1000)), []
    for step in range(1, 4):
        send(mover, offloaded, tier)
        used.append((mover.page_file.used_bytes, mover.pinned.used_bytes))
        assert torch.equal(bring(mover, offloaded), torch.full((1000,), step - 1.0))
        offloaded.here().add_(1)
    assert used == [used[0]] * 3
    assert mover.bytes_moved == 3 * 2 * 4000


def test_here_raises_while_a_movement_is_under_way_and_below(tmp_path):
    gates = {stage: Gate(stage) for stage in ("write", "read")}

    def delay(stage: str) -> None:
        gates[stage](stage)

    mover, tensor = make_mover(tmp_path, delay=delay), torch.ones(5)
    offloaded = OffloadedTensor(tensor)
    assert offloaded.here() is tensor
    mover.down(offloaded, "disk")
    for ask in (offloaded.here, lambda: mover.drop(offloaded), lambda: mover.down(offloaded, "disk")):
        with pytest.raises(RuntimeError, match="not on the device"):
            ask()
    assert offloaded.tensor is tensor, "what is being written stays alive"
    gates["write"].open()
    mover.wait(offloaded)
    with pytest.raises(RuntimeError, match="not on the device"):
        offloaded.here()
    mover.up(offloaded)
    with pytest.raises(RuntimeError, match="not on the device"):
        offloaded.here()
    gates["read"].open()
    mover.wait(offloaded)
    assert torch.equal(offloaded.here(), tensor)
    mover.drop(offloaded)
    with pytest.raises(RuntimeError, match="not on the device"):
        offloaded.here()
    assert torch.equal(bring(mover, offloaded), tensor), "dropping leaves the copy below"
    mover.close()


@pytest.mark.parametrize("tier", TIERS)
def test_the_device_copy_is_let_go_at_wait_and_not_before(mover, tier):
    offloaded = OffloadedTensor(torch.ones(100))
    alive = weakref.ref(offloaded.tensor)
    mover.down(offloaded, tier)
    gc.collect()
    assert alive() is not None
    mover.wait(offloaded)
    deadline = time.monotonic() + 5  # a worker may hold its last job for a moment longer
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert alive() is None


def test_a_wait_without_a_movement_does_nothing(mover):
    offloaded = OffloadedTensor(torch.ones(3))
    mover.wait(offloaded)
    assert torch.equal(offloaded.here(), torch.ones(3))


def test_many_movements_at_once_under_random_delays(tmp_path):
    """More than there are workers, of all sizes, up and down at the same time; memory that was let go is scribbled over."""
    source, lock = torch.Generator().manual_seed(7), threading.Lock()

    def delay(stage: str) -> None:
        with lock:
            seconds = torch.rand((), generator=source).item() ** 4 * 0.01
        time.sleep(seconds)

    mover = make_mover(tmp_path, delay=delay)
    tensors = [random_tensor((1 + 997 * i % 9001,), torch.uint8, seed=i) for i in range(24)]
    offloaded_tensors = [OffloadedTensor(tensor.clone()) for tensor in tensors]
    for first, second in (
        (offloaded_tensors[:12], offloaded_tensors[12:]),
        (offloaded_tensors[12:], offloaded_tensors[:12]),
    ):
        for offloaded in first:
            mover.down(offloaded, "disk")
        for offloaded in second:
            if offloaded.tensor is None:
                mover.up(offloaded)
        for offloaded in [*first, *second]:
            mover.wait(offloaded)
        scribble = [torch.full_like(tensor, 255) for tensor in tensors]
    for offloaded in offloaded_tensors:
        if offloaded.tensor is None:
            mover.up(offloaded)
    for offloaded, tensor in zip(offloaded_tensors, tensors, strict=True):
        mover.wait(offloaded)
        assert torch.equal(offloaded.here(), tensor)
        mover.free(offloaded)
    assert mover.page_file.used_bytes == 0 and len(scribble) == 24
    mover.close()


def test_a_plan_that_pages_to_disk_needs_a_page_file():
    with pytest.raises(RuntimeError, match="no page file"):
        Mover(CPU).down(OffloadedTensor(torch.ones(2)), "disk")


def test_nothing_comes_up_that_never_went_down(mover):
    with pytest.raises(RuntimeError, match="no copy below"):
        mover.up(OffloadedTensor(torch.ones(2)))


def test_closing_waits_for_the_workers_and_may_be_repeated(tmp_path):
    mover = make_mover(tmp_path, delay=lambda stage: time.sleep(0.05))
    offloaded = OffloadedTensor(torch.ones(5))
    mover.down(offloaded, "disk")
    mover.close()
    mover.wait(offloaded)  # it was written before the file was closed
    mover.free(offloaded)
    mover.close()


# faults ---------------------------------------------------------------------------------------------------------------


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_appears_at_wait_and_loses_nothing(mover, monkeypatch):
    offloaded = OffloadedTensor(torch.ones(5))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        mover.down(offloaded, "disk")
        with pytest.raises(RunError, match=r"(?s)cannot write.*No space.*free some space"):
            mover.wait(offloaded)
    assert torch.equal(offloaded.here(), torch.ones(5)), "the device copy is there still"
    send(mover, offloaded)
    assert torch.equal(bring(mover, offloaded), torch.ones(5))
    mover.free(offloaded)
    assert mover.page_file.used_bytes == 0


def test_a_failed_read_appears_at_wait(mover):
    offloaded = OffloadedTensor(torch.ones(5))
    send(mover, offloaded)
    os.ftruncate(mover.page_file.fileno(), 0)
    mover.up(offloaded)
    with pytest.raises(RunError, match="truncated"):
        mover.wait(offloaded)
    with pytest.raises(RuntimeError, match="not on the device"):
        offloaded.here()
    mover.wait(offloaded)  # the fault is told once
    mover.free(offloaded)
    assert mover.page_file.used_bytes == 0


def test_a_full_page_file_is_a_run_error_and_loses_nothing(tmp_path):
    mover = make_mover(tmp_path, max_bytes=GRAIN)
    small, large = OffloadedTensor(torch.ones(5)), OffloadedTensor(torch.ones(5000))
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

    mover, offloaded = make_mover(tmp_path, delay=delay), OffloadedTensor(torch.ones(5))
    with pytest.raises(RunError, match=r"(?s)/a/disk.*Input/output error"):
        send(mover, offloaded)
        bring(mover, offloaded)
    mover.close()


@pytest.mark.parametrize("direction", ["down", "up"])
def test_free_after_a_fault_is_quiet(mover, monkeypatch, direction):
    """The fault that matters was raised already; what is cleaned up after it must not hide it."""
    offloaded = OffloadedTensor(torch.ones(5))
    if direction == "up":
        send(mover, offloaded)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        patch.setattr(os, "preadv", no_space)
        (mover.up if direction == "up" else lambda p: mover.down(p, "disk"))(offloaded)
        mover.free(offloaded)
    assert (offloaded.tensor, offloaded.pending, offloaded.offset, offloaded.host) == (None,) * 4
    assert mover.page_file.used_bytes == 0
    mover.free(offloaded)


def test_free_ends_the_movement_under_way_first(tmp_path):
    """Space that a worker still writes to must not be handed out again."""
    gate = Gate("write")
    mover, offloaded, freed = make_mover(tmp_path, delay=gate), OffloadedTensor(torch.ones(5)), threading.Event()
    mover.down(offloaded, "disk")
    thread = threading.Thread(target=lambda: (mover.free(offloaded), freed.set()))
    thread.start()
    assert not freed.wait(0.05)
    assert mover.page_file.used_bytes == GRAIN
    gate.open()
    assert freed.wait(10)
    assert mover.page_file.used_bytes == 0
    thread.join()
    mover.close()
