"""The tiers of a run, opened and closed: page folder and page file, pinned pool, and the budgets held by the system.

`open_tiers` is called after all checks and before the model is loaded. Budgets are held, not hoped for: on CUDA the
allocator refuses what is beyond the device budget (set_per_process_memory_fraction), on the CPU the kernel refuses private
memory beyond it (RLIMIT_DATA, run/host_memory.py), so that a wrong prediction ends in our message and not in the machine's
swap. The page file cannot grow beyond the disk budget. What lies where is decided in plan/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lopt_edge.config import Config
from lopt_edge.errors import RunError
from lopt_edge.plan.budget import Budget, FreeBytes, format_bytes, make_budget
from lopt_edge.plan.knobs import Knobs
from lopt_edge.run.host_memory import available_bytes, cap_data_bytes, pinned_limit_bytes
from lopt_edge.run.meter import resident_bytes
from lopt_edge.run.moves import Mover
from lopt_edge.run.page_dir import PageFile, prepare_page_dir
from lopt_edge.run.pinned import PinnedPool

NO_PAGES = 1 << 16  # bytes reserved where a prediction is not needed


@dataclass(frozen=True)
class PeakBytes:
    """Peaks of the tiers below the device, so far."""

    host: int = 0
    pinned: int = 0
    disk: int = 0


def page_folder(config: Config) -> Path:
    """Where page files live: beside the output, or where the user says."""
    return Path(config.page_dir).expanduser() if config.page_dir else Path(f"{config.output}.pages")


def stated_budget(config: Config, device: torch.device) -> Budget:
    """The budgets of the settings, percentages taken of what is free now. Raises InputError(s)."""
    on_cuda = device.type == "cuda"
    folder = page_folder(config)
    parent = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = FreeBytes(
        device=torch.cuda.mem_get_info(device)[0] if on_cuda else available_bytes() + resident_bytes(),
        host=available_bytes() if on_cuda else None,
        disk=_free_disk(parent),
        pinned=pinned_limit_bytes()[0] if on_cuda else None,
    )
    return make_budget(device_memory=config.device_memory, host_memory=config.host_memory,
                       disk_memory=config.disk_memory, pinned_memory=config.pinned_memory, free=free)  # fmt: skip


def _free_disk(folder: Path) -> int:
    import shutil

    return shutil.disk_usage(folder).free


@contextmanager
def open_tiers(
    config: Config, knobs: Knobs, *, device: torch.device, budget: Budget, need_disk_bytes: int
) -> Iterator[Mover]:
    """The mover of a run, with what its plan needs; page file and folder are gone afterwards."""
    folder, limit = page_folder(config), budget.pinned_bytes
    if limit is None and device.type == "cuda":
        limit = pinned_limit_bytes()[0]
    made, mover = not folder.exists(), None
    try:
        page_file = None
        if "disk" in knobs.tiers:
            prepare_page_dir(folder, need_bytes=need_disk_bytes, disk_budget_bytes=budget.disk_bytes)
            n_bytes = max(need_disk_bytes, NO_PAGES)
            page_file = PageFile(folder, n_bytes=n_bytes, name="run", max_bytes=budget.disk_bytes)
        mover = Mover(device, page_file=page_file, pinned=PinnedPool(device, limit_bytes=limit))
        yield mover
    finally:
        if mover is not None:
            mover.close()
        if made:
            with suppress(OSError):  # it was never made, or something else was put there
                folder.rmdir()


def hold_budget(budget: Budget, device: torch.device) -> Callable[[], None]:
    """Let the system refuse what is beyond the device budget, from now on; returns what lifts that. Raises RunError."""
    if budget.device_bytes is None:
        return lambda: None
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget.device_bytes / total), device)
        return lambda: torch.cuda.set_per_process_memory_fraction(1.0, device)
    left = budget.device_bytes - resident_bytes()
    if left <= 0:
        raise RunError(f"the process already takes {format_bytes(resident_bytes())} of its "
                       f"{format_bytes(budget.device_bytes)}", where="device_memory", fix="raise the budget")  # fmt: skip
    return cap_data_bytes(left)


def peaks_below(mover: Mover) -> PeakBytes:
    pool, file = mover.pinned, mover.page_file
    on_host = pool.peak_bytes if pool.on_cuda else 0
    return PeakBytes(host=on_host, pinned=pool.peak_pinned_bytes, disk=0 if file is None else file.peak_bytes)
