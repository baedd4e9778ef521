"""Intel's and Apple's GPUs, which no run has met: what their classes ask of torch, and whole steps by their rules.

For the first torch's module is played. For the second the row of the kind stands in the CPU's place, so that CPU tensors
are its own: sizes, tiers, staging and sums are those of the kind, numbers are real, and gradients are the CPU's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lopt_edge.errors import InputErrors
from lopt_edge.plan.facts import device_kinds
from lopt_edge.plan.facts.device_kinds import CPU, MPS, XPU, DeviceKind
from lopt_edge.plan.schedule.knobs import default_knobs
from lopt_edge.planning.settings import check_memory_settings
from lopt_edge.run.device import CLASSES, choose_device, choose_dtype, device_of, sum_dtype
from lopt_edge.run.devices import mps
from lopt_edge.run.devices.host import Host
from quant.nf4 import _unpack_codes, pack, unpack_scales
from tests.laws.bench import make_bench, random_batch
from tests.planning.test_settings import make_config

GIB = 1 << 30
CARD, APPLE = torch.device("xpu", 0), torch.device("mps", 0)


class Stream:
    """Copies that are over when they are begun."""

    def record_event(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None, query=lambda: True)

    def mark_compute(self) -> None:
        return None

    def after(self, mark: Any) -> Any:
        return nullcontext()

    def hold_compute(self, mark: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def disguise(monkeypatch: pytest.MonkeyPatch, kind: DeviceKind) -> DeviceKind:
    """Put the row of a kind in the CPU's place, and return it."""
    row = replace(kind, name="cpu")

    class Played(Host):
        kind = row

        def side_stream(self) -> Any:
            return Stream()

    monkeypatch.setitem(device_kinds.KINDS, "cpu", row)
    monkeypatch.setitem(CLASSES, "cpu", Played)
    return row


@pytest.mark.parametrize("kind", [XPU, MPS], ids=lambda kind: kind.name)
def test_a_step_by_the_rules_of_the_kind_has_the_cpus_gradients(four_bit, tmp_path, monkeypatch, kind):
    batches = [random_batch((11, 7)), random_batch((9, 9), seed=1)]
    shape = {"method": "lopt", "num_segments": 2, "n_micro_batches": 2}
    expected = make_bench(four_bit(), **shape).gradients(batches)
    row, facts = disguise(monkeypatch, kind), make_bench(four_bit(), **shape).model.facts
    usual, below = default_knobs(facts, "cpu"), "host" if row.has_host_tier else "disk"
    assert usual.head == "resident" and usual.mlp_tile == row.mlp_tile
    layers = (below,) * facts.n_layers
    moved = replace(
        usual, weights=layers, activations=("page",) * facts.n_layers, pages=below, gradients=below, head="disk"
    )
    for knobs in (usual, moved):
        bench = make_bench(four_bit(), **shape, knobs=knobs, page_dir=tmp_path)
        found = bench.gradients(batches)
        bench.executor.mover.close()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 2e-6 * value.norm(), (name, knobs)
    assert sum_dtype(torch.device("cpu")) == torch.float32, "they have no float64"


def test_codes_are_unpacked_in_the_way_of_a_gpu_to_the_same_bits():
    weight = pack(torch.randn(128, 192, generator=torch.Generator().manual_seed(0)))
    for dtype in (torch.float32, torch.bfloat16):
        ours, usual = (torch.empty(128, 192, dtype=dtype) for _ in range(2))
        _unpack_codes(weight, weight.codes, unpack_scales(weight), ours, on_cpu=False)
        assert torch.equal(ours, weight.unpack_into(usual))


def test_apples_memory_is_one_tier(four_bit):
    facts = make_bench(four_bit()).model.facts
    asked = make_config(weights="host", host_memory="4GiB")
    with pytest.raises(InputErrors) as caught:
        check_memory_settings(asked, facts, device_type="mps")
    assert len(caught.value.errors) == 2
    check_memory_settings(asked, facts, device_type="xpu")


@pytest.fixture
def xpu(monkeypatch) -> list[tuple]:
    """torch.xpu, played: one card of 16 GiB. Returns what was asked of it."""
    asked: list[tuple] = []
    played = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device: "Arc", "is_bf16_supported": lambda including_emulation: True,
        "device": lambda device: nullcontext(), "mem_get_info": lambda device: (12 * GIB, 16 * GIB),
        "get_device_properties": lambda device: SimpleNamespace(total_memory=16 * GIB),
        "memory_reserved": lambda device: 3, "max_memory_reserved": lambda device: 4,
        "memory_allocated": lambda device: 1, "max_memory_allocated": lambda device: 2,
        "set_device": lambda device: asked.append(("set", device)),
        "set_per_process_memory_fraction": lambda share, device: asked.append((share, device)),
    }  # fmt: skip
    for name, value in played.items():
        monkeypatch.setattr(torch.xpu, name, value)
    return asked


def test_intels_figures(xpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, reason = choose_device("auto")
    assert device == CARD and reason == "Arc, untried as yet: cpu is what was measured"
    own = device_of(CARD)
    assert choose_dtype("auto", CARD)[0] == torch.bfloat16 and own.dtype_names() == ("float32", "float16", "bfloat16")
    figures = own.total_bytes(), own.free_bytes(), own.taken_bytes(), own.peak_bytes()
    assert figures == (16 * GIB, 12 * GIB, 3, 4) and own.standing().startswith("untried")
    counters = own.counters()
    assert (counters.live_bytes, counters.peak_bytes) == (1, 2)
    assert not own.pin(torch.empty(8, dtype=torch.uint8)) and own.for_process(3) == CARD
    own.limit(9 * GIB, context_bytes=GIB).lift()
    assert xpu == [("set", CARD), (0.5, CARD), (1.0, CARD)]


def test_apples_figures(monkeypatch):
    asked: list[float] = []
    played = {
        "recommended_max_memory": lambda: 16 * GIB, "driver_allocated_memory": lambda: 3 * GIB,
        "current_allocated_memory": lambda: 2 * GIB, "set_per_process_memory_fraction": asked.append,
    }  # fmt: skip
    for name, value in played.items():
        monkeypatch.setattr(torch.mps, name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(mps, "available_bytes", lambda: 10 * GIB)
    for other in (torch.cuda, torch.xpu):
        monkeypatch.setattr(other, "is_available", lambda: False)
    device, reason = choose_device("auto")
    assert device == APPLE and "untried as yet" in reason and choose_device("mps")[0] == APPLE
    own = device_of(APPLE)
    figures = own.total_bytes(), own.free_bytes(), own.taken_bytes(), own.peak_bytes()
    assert figures == (16 * GIB, 13 * GIB, 3 * GIB, 3 * GIB)
    counters = own.counters()
    counters.start_peak()
    assert (counters.live_bytes, counters.peak_bytes) == (2 * GIB, 2 * GIB)
    own.limit(8 * GIB, context_bytes=0).lift()
    assert asked == [0.5, 1.0] and CPU.has_host_tier is False
