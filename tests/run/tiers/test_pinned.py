"""The arena of pinned memory, against a ledger that is as strict as the driver: what is registered, cut out, given back."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lopt_edge.run.tiers.pinned import PAGE, SLAB_BYTES, PinnedPool
from tests.fake_device.ledger import Ledger

GPU = torch.device("cuda", 0)
MIB = 1 << 20


@pytest.fixture
def driver(monkeypatch) -> Ledger:
    """The ledger in the place of the driver. A launch reads the error that was left behind, and raises it."""
    ledger = Ledger()

    def launch(*_: Any, **__: Any) -> None:
        if ledger.cudaGetLastError():
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: ledger)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch, "ones", launch)
    return ledger


class Mark:
    def __init__(self) -> None:
        self.passed = self.waited = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = self.waited = True


def test_blocks_of_any_size_come_from_few_registrations(driver):
    """A hundred steps of micro-batches of varying lengths: 1,600 blocks out of some slabs, none of them shared."""
    pick, pool = random.Random(1), PinnedPool(GPU)
    for _ in range(100):
        blocks = []
        for number in range(16):
            block = pool.take(pick.randint(1, 2 * MIB))
            block.fill_(number)
            blocks.append(block)
        assert all(bool((block == number).all()) for number, block in enumerate(blocks))
        for block in blocks:
            pool.give(block)
    assert driver.n_registered <= 8 and pool.pinned_bytes == driver.n_bytes <= 2 * pool.peak_bytes + SLAB_BYTES
    pool.close()
    assert not driver.ranges and pool.used_bytes == 0


def test_the_next_run_of_the_process_can_pin(driver):
    for _ in range(2):
        pool = PinnedPool(GPU, limit_bytes=4 * MIB)
        block = pool.take(3 * MIB)
        assert driver.is_registered(block)
        pool.close()  # as after a fault: a block is still out
        block.fill_(1)
        assert not driver.ranges


def test_a_block_that_is_being_copied_is_not_cut_out_again(driver):
    pool, mark = PinnedPool(GPU, limit_bytes=2 * PAGE), Mark()
    first = pool.take(PAGE)
    pool.give(first, after=mark)
    second = pool.take(100)
    assert mark.waited or second.data_ptr() != first.data_ptr()
    late = Mark()
    pool.give(second, after=late)
    late.passed = True
    pool.take(2 * PAGE if mark.passed and pool.pinned_bytes >= 2 * PAGE else 100)
    assert not late.waited, "a mark that has passed is not waited for"


def test_the_limit_is_kept_and_said_once(driver):
    pool = PinnedPool(GPU, limit_bytes=MIB)
    kept = pool.take(MIB // 2)
    with pytest.warns(UserWarning, match=r"budget is used up.*pageable"):
        beyond = pool.take(MIB)
    assert pool.take(MIB).nbytes == beyond.nbytes == MIB  # no second warning: it would be an error here
    assert driver.is_registered(kept) and not driver.is_registered(beyond) and driver.n_bytes <= MIB
    pool.give(beyond)
    assert pool.pinned_bytes <= MIB
    assert driver.is_registered(pool.take(MIB // 4)) or pool.pinned_bytes == MIB // 2


def test_a_refusal_leaves_no_error_behind(driver):
    """What the driver leaves behind would be raised by the next launch, which did nothing wrong."""
    driver.limit_bytes = MIB
    pool = PinnedPool(GPU)
    with pytest.warns(UserWarning, match=r"the driver refused it.*pageable"):
        block = pool.take(2 * MIB)
    assert block.nbytes == 2 * MIB and driver.refusals == 1 and driver.error == 0
    assert pool.take(MIB // 2).nbytes == MIB // 2 and driver.refusals == 1, "it is asked once"


def test_nothing_is_registered_where_the_host_is_no_tier(driver):
    pool = PinnedPool(torch.device("cpu"))
    pool.give(pool.take(1000), after=SimpleNamespace())
    pool.close()
    assert driver.n_registered == 0 and pool.used_bytes == 0


def test_the_ledger_is_strict():
    ledger = Ledger()
    assert ledger.cudaHostRegister(4096, 4096, 0) == 0
    with pytest.raises(AssertionError, match="overlap"):
        ledger.cudaHostRegister(8000, 100, 0)
    with pytest.raises(AssertionError, match="nothing that begins"):
        ledger.cudaHostUnregister(5000)
    assert ledger.cudaHostRegister(0, 0, 0) != 0 and ledger.cudaGetLastError() != 0 and ledger.cudaGetLastError() == 0
