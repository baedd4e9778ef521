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
from lopt_edge.run.tiers.moves import Mover, Parcel
from lopt_edge.run.tiers.page_file import GRAIN
from tests.run.tiers.movers import CPU, DTYPES, SHAPES, TIERS, Gate, bits, bring, make_mover, random_tensor, send


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[Mover]:
    made = make_mover(tmp_path)
    yield made
    made.close()


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
