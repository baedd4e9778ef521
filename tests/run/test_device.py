"""What stands for a device: the CPU's figures, CUDA's with a fake torch, a further kind; and that nobody goes past it."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lopt_edge.errors import InputError, RunError
from lopt_edge.plan.costs.tiles import EFFICIENT, FLASH
from lopt_edge.plan.facts import device_kinds
from lopt_edge.plan.facts.device_kinds import CPU, CUDA, DEVICE_TYPES, KINDS, in_words, kind_of
from lopt_edge.run import device as devices
from lopt_edge.run.device import CLASSES, choose_device, choose_dtype, device_of, random_sources
from lopt_edge.run.devices import cuda
from lopt_edge.run.devices.cuda import Cuda
from lopt_edge.run.devices.host import Host
from lopt_edge.run.tiers.moves import Mover, OffloadedTensor
from lopt_edge.run.tiers.pinned import PAGE, PinnedPool
from lopt_edge.system.memory import resident_bytes

ROOT = Path(__file__).parents[2]
HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1 << 20


# nobody goes past it ----------------------------------------------------------------------------------------------------

KNOW_KINDS = tuple(ROOT / "lopt_edge" / place for place in ("run/device.py", "run/devices", "plan/facts"))
MODULES = re.compile(r"\btorch\.(cuda|xpu|mps)\b")  # of torch, each for one kind of device


def sources() -> list[Path]:
    found = [*(ROOT / "lopt_edge").rglob("*.py"), *(ROOT / "quant").rglob("*.py")]
    return [path for path in found if not any(path == known or known in path.parents for known in KNOW_KINDS)]


def names_of_kinds(tree: ast.AST) -> Iterator[int]:
    """The lines where a device's name is compared, is a key, or is what a name begins with."""

    def named(node: ast.AST | None) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(named(one) for one in node.elts)
        return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.rstrip(":") in DEVICE_TYPES

    for node in ast.walk(tree):
        asked: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            asked = [*node.keys]
        elif isinstance(node, ast.Subscript):
            asked = [node.slice]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asked = [*node.args] if node.func.attr in ("startswith", "get", "pop") else []
        if any(named(one) for one in asked):
            yield node.lineno


def test_no_other_file_knows_kinds_of_devices():
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources()}
    assert len(texts) > 100
    assert not [path for path, text in texts.items() if MODULES.search(text)], "that is run/devices'"
    found = [f"{path}:{line}" for path, text in texts.items() for line in names_of_kinds(ast.parse(text))]
    assert not found, "ask a field of plan/facts/device_kinds.py"


@pytest.mark.parametrize(
    "text",
    [
        'device.type == "cuda"',
        '"cpu" != device_type',
        'name in ("auto", "cpu")',
        'SIZES = {"cpu": 1, "cuda": 2}',
        'SIZES["cpu"]',
        'where.startswith("cuda:")',
        'SIZES.get("cuda", 1)',
        'match kind:\n    case "cpu":\n        pass',
        'x: Literal["auto", "cpu"] = 1',
    ],
)
def test_what_is_looked_for(text):
    assert list(names_of_kinds(ast.parse(text)))


def test_what_may_be_said():
    assert not list(
        names_of_kinds(ast.parse('torch.device("cpu"), Card(kind="cpu"), {"random.cuda": 1}, x == "cuda graph"'))
    )


# the rows ---------------------------------------------------------------------------------------------------------------


def test_each_kind_has_its_row_and_its_class():
    assert set(KINDS) == set(CLASSES) and all(CLASSES[name].kind is kind for name, kind in KINDS.items())
    assert kind_of("cuda:3") is CUDA and kind_of("cpu") is CPU
    assert list(CLASSES)[-1] == CPU.name, "auto takes the CPU where there is nothing else"
    with pytest.raises(KeyError):
        kind_of("meta")


def test_a_choice_in_words():
    assert (in_words("a"), in_words("a", "b"), in_words("a", "b", "c")) == ("a", "a or b", "a, b or c")


# the CPU ----------------------------------------------------------------------------------------------------------------


def test_the_hosts_figures():
    host = device_of(HOST)
    assert isinstance(host, Host) and host.kind is CPU
    assert 0 < host.taken_bytes() <= host.peak_bytes() < host.total_bytes()
    assert host.taken_bytes() < host.free_bytes() <= host.total_bytes() + resident_bytes()
    assert host.name() and host.capability() is None and host.counters() is None and host.side_stream() is None
    assert host.for_process(3) == HOST and Host.found()[0].device == HOST
    assert not host.pin(torch.empty(8, dtype=torch.uint8))
    host.synchronize()
    with host.made_current():
        assert set(host.dtype_names()) <= set(CPU.measured_dtypes)


def test_the_hosts_random_numbers():
    (host,) = random_sources(HOST)
    state = host.random_state()
    first = torch.rand(3)
    host.set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_limit_below_what_is_taken_is_refused():
    with pytest.raises(RunError, match=r"the process already takes .* of its 1 MiB"):
        device_of(HOST).limit(MIB, context_bytes=0)


def test_choices_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == (HOST, "no CUDA, XPU or MPS device found")
    assert choose_device("cpu") == (HOST, "asked for")
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("hpu"))
        assert choose_device("auto") == (HOST, "no CUDA, XPU or MPS device found; hpu is not supported yet")
    with pytest.raises(InputError, match="no CUDA device to torch") as caught:
        choose_device("cuda")
    assert "use --device cpu" in str(caught.value)
    with pytest.raises(InputError) as caught:
        choose_device("tpu")
    assert "choose auto, cpu, cuda, xpu or mps" in str(caught.value)
    with pytest.raises(InputError, match="float16 overflows"):
        choose_dtype("float16", HOST)
    assert choose_dtype("bfloat16", HOST) == (torch.bfloat16, "asked for")
    with pytest.raises(InputError, match="is unknown"):
        choose_dtype("int4", HOST)


# CUDA, played -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def played(monkeypatch) -> SimpleNamespace:
    """A torch.cuda of two cards with 10 of 24 GiB free; `calls` are what changed something."""
    calls: list[tuple[Any, ...]] = []
    facts = SimpleNamespace(name="a card", total_memory=24 << 30, major=8, minor=9)
    answers = {"is_available": True, "device_count": 2, "current_device": 1, "get_device_name": facts.name,
               "get_device_properties": facts, "mem_get_info": (10 << 30, 24 << 30), "memory_reserved": 3 * MIB,
               "max_memory_reserved": 5 * MIB, "memory_allocated": MIB, "max_memory_allocated": 2 * MIB}  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name in ("set_per_process_memory_fraction", "reset_peak_memory_stats", "set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name: calls.append((name, *given)))
    driver = SimpleNamespace(
        cudaHostRegister=lambda place, n_bytes, _: calls.append(("register", n_bytes)) or 0,
        cudaHostUnregister=lambda place: calls.append(("unregister",)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return SimpleNamespace(calls=calls)


def test_cudas_figures(played):
    gpu = device_of(GPU)
    assert isinstance(gpu, Cuda)
    assert (gpu.name(), gpu.capability(), gpu.total_bytes(), gpu.free_bytes()) == ("a card", "8.9", 24 << 30, 10 << 30)
    assert (gpu.taken_bytes(), gpu.peak_bytes()) == (3 * MIB, 5 * MIB)
    counters = gpu.counters()
    assert counters is not None
    counters.start_peak()
    assert (counters.live_bytes, counters.peak_bytes) == (MIB, 2 * MIB)
    assert gpu.for_process(3) == torch.device("cuda", 1)
    gpu.synchronize()
    assert [name for name, *_ in played.calls] == ["reset_peak_memory_stats", "set_device", "synchronize"]
    assert [one.device.index for one in devices.accelerators()] == [0, 1]
    assert choose_device("auto") == choose_device("cuda") == (torch.device("cuda", 1), "a card")


@pytest.mark.parametrize(
    ("environment", "platform", "wsl", "grows", "words"),
    [
        ({}, "linux", False, True, "segments that grow"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            "linux",
            False,
            False,
            "as PYTORCH_CUDA_ALLOC_CONF says: max",
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "linux", True, False, "as PYTORCH_ALLOC_CONF says: exp"),
        ({}, "linux", True, False, "fixed segments, since the driver of WSL"),
        ({}, "win32", False, False, "fixed segments, since this system"),
    ],
)
def test_segments_grow_unless_the_user_or_the_system_says_otherwise(
    played, monkeypatch, environment, platform, wsl, grows, words
):
    for name in cuda.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cuda.sys, "platform", platform)
    monkeypatch.setattr(cuda, "is_wsl", lambda: wsl)
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    device_of(GPU).settle_allocator()
    assert asked == (["expandable_segments:True"] if grows else [])
    assert str(device_of(GPU).allocator()).startswith(words)
    assert device_of(HOST).allocator() is None


def test_the_same_bits_are_asked_for_and_given_back(played, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setenv(*cuda.CUBLAS_WORKSPACE)
    monkeypatch.delenv(cuda.CUBLAS_WORKSPACE[0])  # undone at the test's end, whatever it sets
    gpu = device_of(GPU)
    assert gpu.attention_kernel(torch.bfloat16, 128) == FLASH
    with gpu.made_deterministic():
        assert torch.are_deterministic_algorithms_enabled() and os.environ[cuda.CUBLAS_WORKSPACE[0]] == ":4096:8"
        assert gpu.attention_kernel(torch.bfloat16, 128) == EFFICIENT
    assert not torch.are_deterministic_algorithms_enabled() and gpu.attention_kernel(torch.bfloat16, 128) == FLASH


def test_cudas_limit_is_a_share_of_the_card(played):
    wall = device_of(GPU).limit(13 << 30, context_bytes=1 << 30)
    wall.renew()  # its allocator counts what it has given back itself
    wall.lift()
    assert played.calls == [("set_per_process_memory_fraction", share, GPU) for share in (0.5, 1.0)]


def test_the_pool_pins_what_its_device_pins(played):
    pool = PinnedPool(GPU, limit_bytes=PAGE)
    block = pool.take(600)
    pool.give(block)
    assert pool.is_tier and pool.pinned_bytes == PAGE and pool.take(700).data_ptr() == block.data_ptr()
    pool.close()
    assert played.calls == [("register", PAGE), ("unregister",)] and pool.pinned_bytes == 0


# a further kind ---------------------------------------------------------------------------------------------------------


class _Stream:
    """Copies of a device that is the CPU in disguise: all is done when it is begun; `log` says in which order."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_event(self) -> Any:
        self.log.append("recorded")
        return SimpleNamespace(synchronize=lambda: self.log.append("waited"), query=lambda: True)

    def mark_compute(self) -> str:
        self.log.append("compute marked")
        return "mark"

    def after(self, mark: Any) -> Any:
        self.log.append(f"after {mark}")
        return nullcontext()

    def hold_compute(self, mark: Any) -> None:
        self.log.append("compute held")

    def synchronize(self) -> None:
        self.log.append("synchronised")


@pytest.fixture
def further(monkeypatch) -> list[str]:
    """One row and one class in the CPU's place, so that torch's CPU tensors are its own. Returns its stream's log."""
    log: list[str] = []
    row = replace(CUDA, name="cpu", title="XPU", watcher="xpu-smi")

    class Further(Host):
        kind = row

        def name(self) -> str:
            return "a further card"

        def side_stream(self) -> Any:
            return _Stream(log)

        def pin(self, block: torch.Tensor) -> bool:
            log.append("pinned")
            return True

    monkeypatch.setitem(device_kinds.KINDS, "cpu", row)
    monkeypatch.setitem(CLASSES, "cpu", Further)
    return log


def test_a_further_kind_is_a_row_and_a_class(further):
    assert device_of(HOST).name() == "a further card" and kind_of("cpu").title == "XPU"
    mover = Mover(HOST)
    offloaded = OffloadedTensor(torch.arange(4.0))
    mover.down(offloaded, "host")
    mover.wait(offloaded)
    assert offloaded.tensor is None and offloaded.is_below
    assert further == ["pinned", "compute marked", "after mark", "recorded", "compute held"]
    further.clear()
    mover.up(offloaded)
    mover.wait(offloaded)
    assert offloaded.here().tolist() == [0, 1, 2, 3]
    assert further == ["compute marked", "after mark", "recorded", "compute held"]
    mover.close()
