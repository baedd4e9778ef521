"""The memory tracker: each storage counts once, from the call that made it until it is freed, and the peak between."""

from __future__ import annotations

import torch
from torch import nn

from lopt_edge.run.watch.tracker import MemoryTracker

KIB = 256  # fp32 numbers


def test_a_tensor_counts_from_its_making_to_its_end():
    with MemoryTracker() as tracker:
        a = torch.zeros(KIB)
        b = a + 1
        assert tracker.live_bytes == tracker.peak_bytes == 2048
        del a
        assert (tracker.live_bytes, tracker.peak_bytes) == (1024, 2048)
        del b
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 2048)


def test_views_and_aliases_count_once():
    with MemoryTracker() as tracker:
        a = torch.zeros(2, KIB)
        views = [a[0], a.view(-1), a.t(), a.detach(), a.expand(3, 2, KIB), a.reshape(KIB, 2)]
        assert tracker.live_bytes == 2048
        del a
        assert tracker.live_bytes == 2048, "a view keeps the whole storage"
        views.clear()
        assert tracker.live_bytes == 0


def test_in_place_operations_make_nothing():
    with MemoryTracker() as tracker:
        a, b = torch.zeros(KIB), torch.ones(KIB)
        a.add_(b).mul_(2)
        torch.mul(a, b, out=b)
        a[:10].copy_(b[:10])
        assert tracker.peak_bytes == 2048


def test_what_an_operation_frees_at_once_is_in_the_peak():
    with MemoryTracker() as tracker:
        a = torch.zeros(KIB)
        a = (a + 1).sum()
        assert tracker.live_bytes == 4
        assert tracker.peak_bytes == 2048 + 4, "a was still bound"


def test_the_peak_can_begin_again():
    with MemoryTracker() as tracker:
        a = torch.zeros(KIB)
        torch.zeros(4 * KIB)
        tracker.start_peak()
        assert tracker.peak_bytes == 1024
        torch.zeros(2 * KIB)
        assert tracker.peak_bytes == 1024 + 2048
        del a


def test_tensors_of_before_count_once_they_are_watched():
    before, view, other = torch.zeros(KIB), None, torch.zeros(KIB)
    view = before[:5]
    with MemoryTracker() as tracker:
        before + 1
        assert tracker.live_bytes == 0
        tracker.watch([before, view, before])
        assert tracker.live_bytes == 1024
        made = torch.zeros(KIB)
        tracker.watch([made])
        assert tracker.live_bytes == 2048
        del before, view
        assert tracker.live_bytes == 1024
    assert other.nbytes == 1024


def test_an_argument_returned_as_a_result_counts_from_then():
    """A storage that was not watched is seen once an operation hands it out."""
    old = torch.zeros(KIB)
    with MemoryTracker() as tracker:
        view = old[:10]
        assert tracker.live_bytes == old.nbytes
        del view, old
        assert tracker.live_bytes == 0


def test_what_is_freed_afterwards_is_forgotten():
    with MemoryTracker() as tracker:
        a = torch.zeros(KIB)
    del a
    assert tracker.live_bytes == 0
    torch.zeros(KIB)
    assert tracker.peak_bytes == 1024, "nothing is seen outside"


def test_autograd_is_seen_forward_and_backward():
    layer, x = nn.Linear(KIB, 4, bias=False), torch.zeros(KIB, KIB, requires_grad=True)
    with MemoryTracker() as tracker:
        tracker.watch([x, *layer.parameters()])
        before = tracker.live_bytes
        y = layer(x).relu()
        assert tracker.live_bytes - before == y.nbytes
        y.backward(torch.ones_like(y))
        assert tracker.live_bytes - before == y.nbytes + x.nbytes + layer.weight.nbytes
        assert x.grad is not None


def test_several_results_of_one_call():
    with MemoryTracker() as tracker:
        parts = torch.zeros(4 * KIB).topk(KIB)
        assert tracker.live_bytes == KIB * (4 + 8)
        assert len(parts) == 2


def test_another_device_is_left_out():
    with MemoryTracker("meta") as tracker:
        a = torch.zeros(KIB)
        tracker.watch([a])
        assert tracker.live_bytes == 0
    with MemoryTracker() as tracker:
        b = torch.zeros(KIB, device="meta")
        tracker.watch([b])
        assert tracker.live_bytes == 0


def test_an_address_that_is_used_again_is_another_storage():
    with MemoryTracker() as tracker:
        for n in (KIB, 2 * KIB, KIB):
            a = torch.zeros(n)
            assert tracker.live_bytes == 4 * n
            del a
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 2048)
