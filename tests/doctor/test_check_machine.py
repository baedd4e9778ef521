"""The doctor on this machine, and on machines that are worse off: each problem is told with its advice, never a crash."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lopt_edge.doctor import check_machine as doctor
from lopt_edge.doctor.check_machine import Device, Report, Tier, check_machine, render
from lopt_edge.doctor.layer_check import Check, check_layer, exact_weight
from lopt_edge.system.memory import cgroup_memory
from quant.nf4 import pack, unpack_into

GIB = 1 << 30


@pytest.fixture(scope="module")
def report() -> Report:
    return check_machine()


def shown(report: Report) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(report))
    return captured.get()


def advice(report: Report, problem: str) -> str:
    found = [text for name, text in report.problems if problem in name]
    assert len(found) == 1, report.problems
    assert "\n" not in found[0]
    return found[0]


def test_this_machine_is_sound(report):
    assert report.sound, report.problems
    assert report.versions["torch"] == torch.__version__
    assert {(check.device, check.dtype) for check in report.checks} >= {("cpu", "float32"), ("cpu", "bfloat16")}
    assert all(set(check.errors) == {"weight", "y", "dx", "dA", "dB"} for check in report.checks)
    assert report.devices[-1].name == "cpu" and report.devices[-1].cores >= 1
    assert [tier.name for tier in report.tiers][-2:] == ["disk", "disk"]
    assert all(0 <= tier.free_bytes <= tier.total_bytes for tier in report.tiers)


def test_json_and_page_hold_the_same(report):
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["sound"] is True
    assert found["checks"][0]["passed"] is True
    page = shown(report)
    for text in (report.choice.dtype_reason, report.devices[-1].model, *filter(None, report.versions.values())):
        assert text in page
    assert len(found["problems"]) == page.count("problem:")


def test_exact_weight_is_what_the_kernels_unpack():
    packed = pack(torch.randn(128, 192, generator=torch.Generator().manual_seed(1)))
    fast = unpack_into(packed, torch.empty(128, 192))
    assert torch.allclose(exact_weight(packed), fast.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("package", doctor.PACKAGES)
def test_missing_package_is_a_problem(monkeypatch, package):
    def without(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without)
    monkeypatch.setattr(doctor, "check_layers", lambda: (Check("cpu", "float32", {}, {}, fault="ImportError: gone"),))
    report = check_machine()
    assert not report.sound
    assert "pip install" in advice(report, f"{package} is not installed")
    assert not any("NF4" in problem for problem, _ in report.problems)  # what follows from it is not told again
    assert "missing" in shown(report)
    json.dumps(report.as_dict(), allow_nan=False)


def test_broken_torch_is_a_finding(monkeypatch):
    def broken() -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    for probe in ("_torch_cuda", "_gpus", "_choice", "check_layers"):
        monkeypatch.setattr(doctor, probe, broken)
    report = check_machine()
    assert not report.sound
    assert "fresh virtual environment" in advice(report, "libcudart.so.13")
    assert "libcudart" in shown(report)


def test_kernel_that_raises(monkeypatch, report):
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr("quant.nf4.pack", broken)
    check = check_layer("cpu", dtype="float32")
    assert not check.passed and check.fault == "RuntimeError: no kernel image"
    worse = replace(report, checks=(check,))
    assert not worse.sound
    assert "bitsandbytes" in advice(worse, "failed on cpu in float32")


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_kernel_that_is_wrong(monkeypatch, report, factor):
    monkeypatch.setattr("quant.nf4.PackedWeight.unpack_into", lambda weight, out: unpack_into(weight, out).mul_(factor))
    check = check_layer("cpu", dtype="float32")
    assert check.fault is None and not check.passed
    worse = replace(report, checks=(check,))
    assert "do not train in float32" in advice(worse, "relative error of y")
    json.dumps(worse.as_dict(), allow_nan=False)
    assert "FAIL" in shown(worse)


def test_gpu_that_torch_does_not_see(report):
    system = replace(report.system, nvidia=True, torch_cuda=None)
    no_gpu = replace(report, system=system, devices=(Device("cpu", "a CPU", 8 * GIB),))
    assert "CUDA build" in advice(no_gpu, "built for the CPU")
    no_gpu = replace(no_gpu, system=replace(system, torch_cuda="13.0"))
    assert "driver" in advice(no_gpu, "finds no GPU")
    assert no_gpu.sound  # it trains on the CPU


def test_an_accelerator_that_no_run_uses_is_said(report):
    assert report.system.unused is None
    apple = replace(report, system=replace(report.system, unused="hpu"))
    assert "--device cpu" in advice(apple, "an accelerator (hpu) that lopt-edge does not use yet")
    assert apple.sound


def test_gpu_of_others_under_wsl(report):
    gpu = Device("cuda:0", "a GPU", 24 * GIB, capability="8.9", standing="untried", allocator="segments that grow")
    tier = Tier("device", "cuda:0", 24 * GIB, 3 * GIB)
    worse = replace(report, devices=(gpu, *report.devices), tiers=(tier,), system=replace(report.system, wsl=True))
    assert "nvidia-smi" in advice(worse, "memory of cuda:0: 3.0 of 24.0 GiB free")
    assert "host tier" in advice(worse, "WSL")
    assert all(word in shown(worse) for word in ("capability 8.9", "untried", "segments that grow"))


def test_little_memory_and_disk(report):
    tiers = (
        Tier("device", "RAM", 8 * GIB, GIB),
        Tier("disk", "model cache (/tmp/cache)", 8 * GIB, 2 * GIB, file_system="tmpfs"),
        Tier("disk", "current folder (/tmp)", 8 * GIB, 0, file_system="tmpfs"),
    )
    worse = replace(report, tiers=tiers)
    assert "--max-seq-len" in advice(worse, "little RAM is free: 1.0 of 8.0 GiB free")
    assert "--cache-dir" in advice(worse, "lies in memory (tmpfs)")
    assert "--cache-dir" in advice(worse, "little disk is free")
    assert worse.sound


def test_cache_folder_need_not_exist(tmp_path):
    tier = check_machine(cache_dir=tmp_path / "not" / "yet").tiers[-2]
    assert str(tmp_path / "not" / "yet") in tier.where and tier.total_bytes > 0
    assert not (tmp_path / "not").exists()


def test_no_control_groups(tmp_path):
    assert cgroup_memory(membership=tmp_path / "none", root=tmp_path) is None
    (tmp_path / "cgroup").write_text("0::/\n")
    assert cgroup_memory(membership=tmp_path / "cgroup", root=tmp_path) is None


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_control_groups_version_2(tmp_path):
    (tmp_path / "membership").write_text("0::/user/app\n")
    group(tmp_path / "user", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"inactive_file {GIB}")
    group(tmp_path / "user" / "app", memory__max="max", memory__current=GIB, memory__stat="inactive_file 0")
    assert cgroup_memory(membership=tmp_path / "membership", root=tmp_path) == (4 * GIB, 2 * GIB)


def test_control_groups_version_1(tmp_path):
    (tmp_path / "membership").write_text("5:devices:/\n4:memory:/docker/x\n0::/\n")
    limits = {"memory__limit_in_bytes": 2 * GIB, "memory__usage_in_bytes": GIB}
    group(tmp_path / "memory", **limits, memory__stat=f"cache 1\ntotal_inactive_file {GIB // 2}")  # the container's own
    assert cgroup_memory(membership=tmp_path / "membership", root=tmp_path) == (2 * GIB, 3 * GIB // 2)


def test_limit_of_the_container_counts(monkeypatch):
    monkeypatch.setattr(doctor, "cgroup_memory", lambda: (GIB, GIB // 4))
    tier = doctor._host_tier(has_gpu=False)
    assert (tier.name, tier.total_bytes, tier.free_bytes) == ("device", GIB, GIB // 4)
    assert doctor._host_tier(has_gpu=True).name == "host"
