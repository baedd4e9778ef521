"""The tiers of a run, opened and closed: page folder and page files, pinned pool, and the budgets that the system enforces.

`check_folders` is called before anything is made, so that a cache or page folder that is memory in disguise is reported
in seconds, not after the model was quantised; `open_tiers` after all checks and before the model is loaded. Budgets are
enforced, not hoped for: on a GPU the allocator refuses what is beyond the device budget (run/device.py), on the CPU
the kernel refuses private memory beyond it (RLIMIT_DATA, system/memory.py), so that a wrong prediction ends in our
message and not in the machine's swap. Page files cannot grow beyond the disk budget. What lies where plan/ decides.

There are two page files where optimizer states are paged: one for everything, and one for the undo copies of the step under
way (the journal, run/step/optim.py). Whoever damages one of them leaves the other, and the last finished step with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass

import torch

from lopt_edge.config.settings import Config, page_folder
from lopt_edge.errors import InputError, raise_collected
from lopt_edge.models.folder import ModelFolder
from lopt_edge.models.four_bit import folder_bytes, four_bit_path
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.run.device import device_of
from lopt_edge.run.devices.interface import Wall
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.run.tiers.page_file import PageFile
from lopt_edge.run.tiers.page_folder import check_page_dir, prepare_page_dir
from lopt_edge.run.tiers.pinned import PinnedPool
from lopt_edge.system.file_systems import memory_file_system
from lopt_edge.system.memory import pinned_limit_bytes
from lopt_edge.units import format_bytes

PAGES_NAME, JOURNAL_NAME = "run", "journal"  # of the page files


@dataclass(frozen=True)
class PeakBytes:
    """The peaks of the tiers below the device, so far."""

    host: int = 0
    pinned: int = 0
    disk: int = 0


def check_folders(config: Config, source: ModelFolder, knobs: Knobs, budget: Budget, *, need_disk_bytes: int) -> list[str]:
    """Refuse a cache or page folder that this run would use and cannot, both together (InputErrors). Returns warnings."""
    errors: list[InputError] = []
    warnings: list[str] = []
    weights = four_bit_path(source, cache_dir=config.cache_dir)
    if kind := memory_file_system(weights):
        if source.facts.quantised:  # the user's own folder: it was there before the run, and does not grow in it
            warnings.append(
                f"the 4-bit model {weights} lies in memory (file system {kind}): its "
                f"{format_bytes(folder_bytes(weights))} count in no budget, and --weights disk frees nothing; "
                "copy it to a disk"
            )
        else:
            what = (
                f"{weights.parent} lies in memory, not on a disk (file system {kind}): the 4-bit copy there would take "
                "memory outside the budget"
            )
            errors.append(InputError(what, where="cache_dir", fix="choose a folder on a disk with --cache-dir"))
    if "disk" in knobs.tiers:
        try:
            check_page_dir(page_folder(config), need_bytes=need_disk_bytes, disk_budget_bytes=budget.disk_bytes)
        except InputError as error:
            errors.append(error)
    raise_collected(errors)
    return warnings


@contextmanager
def open_tiers(
    config: Config, knobs: Knobs, *, device: torch.device, budget: Budget, need_disk_bytes: int, journal_bytes: int
) -> Iterator[Mover]:
    """The mover of a run, with what its plan needs; page files and folder are gone afterwards.

    `journal_bytes` of `need_disk_bytes` are the journal's.
    """
    folder, limit = page_folder(config), budget.pinned_bytes
    if limit is None and kind_of(device.type).host_is_below:
        limit = pinned_limit_bytes()[0]
    ours = config.page_dir is None or not folder.exists()  # beside the output it is ours, also if a killed run made it
    try:
        with ExitStack() as stack:
            page_file = journal_file = None
            if "disk" in knobs.tiers:
                prepare_page_dir(folder, need_bytes=need_disk_bytes, disk_budget_bytes=budget.disk_bytes)
                if journal_bytes:
                    journal_file = PageFile(folder, n_bytes=journal_bytes, name=JOURNAL_NAME, max_bytes=journal_bytes)
                    stack.enter_context(journal_file)
                left = None if budget.disk_bytes is None else budget.disk_bytes - journal_bytes
                page_file = PageFile(folder, n_bytes=need_disk_bytes - journal_bytes, name=PAGES_NAME, max_bytes=left)
                stack.enter_context(page_file)
            pinned = PinnedPool(device, limit_bytes=limit)
            yield stack.enter_context(closing(Mover(device, page_file=page_file, journal_file=journal_file, pinned=pinned)))
    finally:
        if ours:
            with suppress(OSError):  # it was never made, or something else was put there
                folder.rmdir()


def hold_budget(budget: Budget, device: torch.device, *, context_bytes: int = 0) -> Wall:
    """Let the system refuse what is beyond the device budget, from now on.

    A GPU's allocator gets the budget less `context_bytes`, which the driver takes beside it. Raises RunError.
    """
    if budget.device_bytes is None:
        return Wall(lambda: None)
    return device_of(device).limit(budget.device_bytes, context_bytes=context_bytes)


def peaks_below(mover: Mover) -> PeakBytes:
    """The peaks of host, pinned and disk so far, of a mover's pool and page files."""
    pool, files = mover.pinned, [file for file in (mover.page_file, mover.journal_file) if file is not None]
    on_host = pool.peak_bytes if pool.is_tier else 0
    return PeakBytes(host=on_host, pinned=pool.peak_pinned_bytes, disk=sum(file.peak_bytes for file in files))
