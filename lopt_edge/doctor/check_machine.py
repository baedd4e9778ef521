"""Looks at the machine and says whether lopt-edge can work on it, and what would help.

`check_machine` gathers facts (versions, devices, memory per tier), takes the same choice of device and dtype as a run
would, and computes one real NF4 + LoRA layer forward and backward on every device in every dtype that a run may use,
against a float64 reference that shares no kernel with it. `Report.problems` follows from these facts alone: each problem
comes with one line of advice. The rule: nothing here may crash on a half-installed machine, since that is when a doctor
is asked for; so torch and everything above it is imported inside functions, and what raises becomes a finding. A report
is sound when a run could work: every package is there and every check passed. Other problems (little memory, say) are
reported, but do not make it unsound.

It changes nothing, times nothing and reaches for no network. Printing and exit codes are the command line's matter.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lopt_edge.doctor.layer_check import Check, check_layers, one_line
from lopt_edge.plan.facts.device_kinds import CPU, kind_of
from lopt_edge.system.cache import default_cache
from lopt_edge.system.file_systems import MEMORY_FILE_SYSTEMS
from lopt_edge.system.memory import cgroup_memory, machine_memory
from lopt_edge.system.processor import processor_name

PACKAGES = ("lopt-edge", "torch", "transformers", "peft", "bitsandbytes", "safetensors")
GIB = 1 << 30
LITTLE_RAM = 2 * GIB  # the libraries take 0.4 GiB, a 1B model's run with its 4-bit weights about 1.5 GiB
LITTLE_DISK = 6 * 10**9  # the 4-bit copy of an 8B model: 3.6 GB of layers, 2.1 GB of vocabulary matrices
CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2", "bf16", "sve_bf16", "sve", "neon")  # torch's names
Problem = tuple[str, str]  # what is wrong, what to do
Found = TypeVar("Found")


@dataclass(frozen=True)
class System:
    """The software of this machine. `nvidia`: there is an NVIDIA driver; `torch_cuda`: the CUDA that torch was built for.

    `faults` are what torch, or a package above it, raised; `unused` is an accelerator that torch finds and no run can use.
    """

    python: str
    platform: str
    wsl: bool
    nvidia: bool
    torch_cuda: str | None
    faults: tuple[str, ...] = ()
    unused: str | None = None


@dataclass(frozen=True)
class Device:
    """A device for computing: `name` is torch's; `features` are the CPU's that matter for the dtype; `capability` is
    CUDA's; `allocator` says how a run takes memory there, `standing` what is known of runs there."""

    name: str
    model: str
    memory_bytes: int
    cores: int | None = None
    features: tuple[str, ...] = ()
    capability: str | None = None
    allocator: str | None = None
    standing: str | None = None


@dataclass(frozen=True)
class Tier:
    """A place for bytes: device, host or disk. Without a GPU the device tier is RAM."""

    name: str
    where: str
    total_bytes: int
    free_bytes: int
    file_system: str | None = None


@dataclass(frozen=True)
class Choice:
    """The device, dtype and kernels that a run on this machine would take, each with the reason."""

    device: str
    device_reason: str
    dtype: str
    dtype_reason: str
    kernels: str
    kernels_reason: str


@dataclass(frozen=True)
class Report:
    """The facts about this machine; problems and verdict follow from them alone."""

    versions: dict[str, str | None]
    system: System
    devices: tuple[Device, ...]
    tiers: tuple[Tier, ...]
    choice: Choice | None
    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The (problem, advice) pairs, the worst first."""
        memory = [problem for tier in self.tiers for problem in _memory_problems(tier)]
        return (*_software_problems(self), *_check_problems(self), *memory)

    @property
    def sound(self) -> bool:
        """Whether a run could work: every package is there and every check passed."""
        return all(self.versions.values()) and bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; an error that is not finite is null."""
        found = asdict(self)
        for entry, check in zip(found["checks"], self.checks, strict=True):
            entry["passed"] = check.passed
            entry["errors"] = {name: value if isfinite(value) else None for name, value in check.errors.items()}
        problems = [{"problem": problem, "advice": advice} for problem, advice in self.problems]
        return {**found, "problems": problems, "sound": self.sound}


def check_machine(*, cache_dir: Path | None = None) -> Report:
    """The report on this machine; takes a few seconds (imports, one small layer for each device and dtype)."""
    versions = {name: _version(name) for name in PACKAGES}
    faults: list[str] = []
    torch_cuda = unused = choice = None
    gpus: tuple[tuple[Device, Tier], ...] = ()
    checks: tuple[Check, ...] = ()
    if versions["torch"] is not None:
        torch_cuda = _attempt(_torch_cuda, None, faults)
        unused = _attempt(_unused, None, faults)
        gpus = _attempt(_gpus, gpus, faults)
        choice = _attempt(_choice, None, faults)
        checks = _attempt(check_layers, checks, faults)
    system = System(
        python=platform.python_version(),
        platform=platform.platform(),
        wsl="microsoft" in platform.release().lower(),
        nvidia=shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists(),
        torch_cuda=torch_cuda,
        faults=tuple(dict.fromkeys(faults)),
        unused=unused,
    )
    host, cache = _host_tier(has_gpu=bool(gpus)), cache_dir or default_cache()
    tiers = (*(tier for _, tier in gpus), host, _disk_tier("model cache", cache), _disk_tier("current folder", Path.cwd()))
    devices = (*(device for device, _ in gpus), cpu_device(host.total_bytes))
    return Report(versions, system, devices, tiers, choice, checks)


# --- facts ------------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _attempt(probe: Callable[[], Found], otherwise: Found, faults: list[str]) -> Found:
    try:
        return probe()
    except Exception as error:  # a broken installation may raise anything
        faults.append(one_line(error))
        return otherwise


def cpu_device(memory_bytes: int = 0) -> Device:
    """The CPU, with the cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch

        capabilities = torch.cpu.get_capabilities()
    except Exception:  # reported by check_machine
        capabilities = {}
    features = tuple(name for name in CPU_FEATURES if capabilities.get(name))
    return Device(CPU.name, processor_name(), memory_bytes, cores=usable, features=features)


def _torch_cuda() -> str | None:
    from lopt_edge.run.device import torch_build

    return torch_build()


def _unused() -> str | None:
    from lopt_edge.run.device import unused_accelerator

    return unused_accelerator()


def _gpus() -> tuple[tuple[Device, Tier], ...]:
    from lopt_edge.run.device import accelerators

    found = []
    for gpu in accelerators():
        device = Device(
            str(gpu.device),
            gpu.name(),
            gpu.total_bytes(),
            capability=gpu.capability(),
            allocator=gpu.allocator(),
            standing=gpu.standing(),
        )
        found.append((device, Tier("device", device.name, device.memory_bytes, gpu.free_bytes())))
    return tuple(found)


def _choice() -> Choice:
    from lopt_edge.run.device import choose_device, choose_dtype
    from lopt_edge.run.kernels.choice import choose_kernels

    device, device_reason = choose_device("auto")
    dtype, dtype_reason = choose_dtype("auto", device)
    return Choice(
        str(device), device_reason, str(dtype).removeprefix("torch."), dtype_reason, *choose_kernels("auto", device)
    )


def _host_tier(*, has_gpu: bool) -> Tier:
    (total, free), where = machine_memory(), "RAM"
    limit = cgroup_memory()
    if limit is not None and limit[0] < total:
        total, free, where = limit[0], min(free, limit[1]), "RAM (limit of this container or control group)"
    return Tier("host" if has_gpu else "device", where, total, free)


def _disk_tier(name: str, folder: Path) -> Tier:
    """The file system that holds `folder` (or would, once it is made)."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()).resolve()
    usage = shutil.disk_usage(existing)
    partitions = [part for part in psutil.disk_partitions(all=True) if existing.is_relative_to(part.mountpoint)]
    kind = max(partitions, key=lambda part: len(part.mountpoint)).fstype if partitions else None
    return Tier("disk", f"{name} ({folder})", usage.total, usage.free, file_system=kind)


# --- problems ---------------------------------------------------------------------------------------------------------


def _software_problems(report: Report) -> list[Problem]:
    system, has_gpu = report.system, any(kind_of(device.name).host_is_below for device in report.devices)
    found = []
    for name in (name for name, installed in report.versions.items() if installed is None):
        what = "-c constraints.txt -e . in lopt-edge's folder" if name == "lopt-edge" else name
        found.append((f"{name} is not installed", f"run pip install {what}"))
    for fault in system.faults:
        found.append(
            (
                f"torch, or a package above it, does not work: {fault}",
                "install lopt-edge again in a fresh virtual environment",
            )
        )
    if system.nvidia and not has_gpu and system.torch_cuda is None and report.versions["torch"]:
        found.append(
            (
                "there is an NVIDIA GPU, but this torch is built for the CPU",
                "install torch's CUDA build: pip "
                "install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
            )
        )
    elif system.nvidia and not has_gpu and system.torch_cuda:
        found.append(
            (
                f"there is an NVIDIA driver, but torch (CUDA {system.torch_cuda}) finds no GPU",
                "update the driver, or give the container its GPU (docker run --gpus all)",
            )
        )
    if system.unused is not None:
        found.append(
            (
                f"torch finds an accelerator ({system.unused}) that lopt-edge does not use yet",
                f"runs take the CPU there: --device {CPU.name}",
            )
        )
    if system.wsl and has_gpu:
        found.append(
            (
                "WSL lets a process pin about 1 GB of host memory",
                "plan no more than that for the host tier; native Linux has no such limit",
            )
        )
    return found


def _check_problems(report: Report) -> list[Problem]:
    if not all(report.versions.values()):
        return []  # the missing package is the problem
    found = []
    for check in (check for check in report.checks if not check.passed):
        where, is_gpu = f"{check.device} in {check.dtype}", kind_of(check.device).host_is_below
        until = f"; until then use --device {CPU.name}" if is_gpu else ""
        if check.fault is not None:
            found.append(
                (
                    f"the NF4 + LoRA layer failed on {where}: {check.fault}",
                    f"install torch and bitsandbytes again, in versions that belong together{until}",
                )
            )
            continue
        wrong = ", ".join(f"{name} {value:.1e}" for name, value in check.errors.items() if not value <= check.bounds[name])
        found.append(
            (
                f"the NF4 + LoRA layer is wrong on {where}: relative error of {wrong}",
                f"do not train in {check.dtype} there; update torch and bitsandbytes{until}",
            )
        )
    return found


def _memory_problems(tier: Tier) -> list[Problem]:
    free, found = _free_text(tier), []
    if tier.where.startswith("RAM") and tier.free_bytes < LITTLE_RAM:
        found.append(
            (
                f"little RAM is free: {free}",
                "close other programs, raise the container's limit, or choose a smaller model and a shorter --max-seq-len",
            )
        )
    is_gpu = tier.name == "device" and not tier.where.startswith("RAM")
    if is_gpu and tier.free_bytes < tier.total_bytes / 2:
        watcher = kind_of(tier.where).watcher
        found.append((f"other programs hold most of the memory of {tier.where}: {free}", f"see {watcher} and close them"))
    if tier.where.startswith("model cache") and tier.file_system in MEMORY_FILE_SYSTEMS:
        found.append(
            (
                f"the {tier.where} lies in memory ({tier.file_system})",
                "choose a folder on a disk with --cache-dir: a 4-bit copy there takes RAM",
            )
        )
    if tier.where.startswith("model cache") and tier.free_bytes < LITTLE_DISK:
        found.append(
            (
                f"little disk is free for the {tier.where}: {free}",
                "free space, or choose another folder with --cache-dir: an 8B model's 4-bit copy takes about 6 GB",
            )
        )
    return found


def _free_text(tier: Tier) -> str:
    return f"{tier.free_bytes / GIB:.1f} of {tier.total_bytes / GIB:.1f} GiB free"


# --- the report as a page ---------------------------------------------------------------------------------------------


def render(report: Report) -> RenderableType:
    """The report for a terminal."""
    table = Table.grid(padding=(0, 2))
    for name, text in _rows(report):
        table.add_row(Text(name, style="bold"), Text(text))
    verdict = Text("sound: lopt-edge can train here" if report.sound else "not sound: lopt-edge cannot train here yet")
    verdict.stylize("bold green" if report.sound else "bold red")
    notes = [Text.assemble((f"problem: {problem}", "yellow"), f"\n  -> {advice}") for problem, advice in report.problems]
    return Group(table, Text(), *notes, verdict)


def _rows(report: Report) -> list[tuple[str, str]]:
    versions = {"python": report.system.python, **report.versions}
    rows = [("versions", ", ".join(f"{name} {installed or 'missing'}" for name, installed in versions.items()))]
    rows.append(("system", report.system.platform + (" (WSL)" if report.system.wsl else "")))
    for device in report.devices:
        parts = [device.model, *([f"{device.cores} cores"] if device.cores else []), *device.features]
        parts += [f"capability {device.capability}"] if device.capability else []
        rows.append((device.name, ", ".join([*parts, f"{device.memory_bytes / GIB:.1f} GiB"])))
        if device.standing is not None:
            rows.append((f"{device.name} tested", device.standing))
        if device.allocator is not None:
            rows.append((f"{device.name} memory", device.allocator))
    for tier in report.tiers:
        kind = f", {tier.file_system}" if tier.file_system else ""
        rows.append((f"{tier.name} tier", f"{tier.where}: {_free_text(tier)}{kind}"))
    if report.choice is not None:
        choice = report.choice
        rows.append(("a run takes", f"{choice.device} ({choice.device_reason}), {choice.dtype} ({choice.dtype_reason})"))
        rows.append(("its kernels", f"{choice.kernels} ({choice.kernels_reason})"))
    for check in report.checks:
        errors = ", ".join(f"{name} {value:.1e}" for name, value in check.errors.items())
        rows.append(
            (
                "layer check",
                f"{check.device} {check.dtype}: {'pass' if check.passed else 'FAIL'}; "
                f"{check.fault or f'relative errors {errors}'}",
            )
        )
    return rows
