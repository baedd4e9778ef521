"""The budgets of a run: what the user stated, and what the machine has where nothing was stated.

The rules: a budget travels with the reason for it, which is printed; one that was stated beyond what the machine or a
control group around the process grants is lowered to that, and said, since the system would kill the run without a word.
Reading a machine's memory is system/memory.py's and run/device.py's (imported where it is asked: a plan loads no torch);
enforcing a budget is training/prepare/tiers.py's.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from lopt_edge.config.settings import Config, page_folder
from lopt_edge.plan.facts.budget import Budget, FreeBytes, make_budget
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.facts.profile import DeviceProfile
from lopt_edge.system.memory import available_bytes, granted_bytes, pinned_limit_bytes
from lopt_edge.units import format_bytes

if TYPE_CHECKING:
    import torch

FREE_SHARE = 0.9  # of what is free: the budget if none was stated
GRANTED_SHARE = 0.95  # of what a group grants: the kernel's own memory for the process counts there, too


def stated_budget(config: Config, device: torch.device) -> tuple[Budget, tuple[str, ...]]:
    """The budgets of the settings, and a sentence for each that was lowered to what there is.

    Percentages are of what is free now. Raises InputError(s).
    """
    from lopt_edge.run.device import device_of

    host_is_below, has_host = kind_of(device.type).host_is_below, kind_of(device.type).has_host_tier
    folder = page_folder(config)
    parent = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    n = config.ranks  # a budget is one rank's; of what they share each has its part
    pinned = pinned_limit_bytes()[0] if has_host else None
    free = FreeBytes(
        device=device_of(device).free_bytes() // (1 if host_is_below else n),
        host=available_bytes() // n if has_host else None,
        disk=shutil.disk_usage(parent).free // n,
        pinned=None if pinned is None else pinned // n,
    )
    stated = make_budget(
        device_memory=config.device_memory,
        host_memory=config.host_memory,
        disk_memory=config.disk_memory,
        pinned_memory=config.pinned_memory,
        free=free,
    )
    stated = with_pinned_limit(stated, device.type)
    lowered, reasons = within_granted(stated, device.type, ranks=n)
    found, more = within_free(lowered, device)
    return found, (*reasons, *more)


def with_pinned_limit(stated: Budget, device_type: str) -> Budget:
    """The budgets with what this machine lets a process page-lock, where nothing was stated: the search counts on it."""
    if stated.pinned_bytes is not None or not kind_of(device_type).has_host_tier:
        return stated
    return replace(stated, pinned_bytes=pinned_limit_bytes()[0])


def within_free(stated: Budget, device: torch.device) -> tuple[Budget, tuple[str, ...]]:
    """The budgets with a GPU's lowered to what other programs leave of it now, and a sentence if it was."""
    from lopt_edge.run.device import device_of

    own, asked = device_of(device), stated.device_bytes
    if asked is None or not own.kind.host_is_below:
        return stated, ()
    free = own.free_bytes() + own.taken_bytes() + own.kind.context_bytes  # this process' own context is there by now
    if asked <= free:
        return stated, ()
    return replace(stated, device_bytes=free), (
        f"device memory lowered from the {format_bytes(asked)} that were stated to the {format_bytes(free)} that other "
        f"programs leave of {own.name()} (see {own.kind.watcher})",
    )


def within_granted(stated: Budget, device_type: str, *, ranks: int = 1) -> tuple[Budget, tuple[str, ...]]:
    """The budgets with that of this machine's RAM lowered to what each rank may have of it, and a sentence if it was."""
    tier = "host" if kind_of(device_type).has_host_tier else "device"
    asked = stated.host_bytes if tier == "host" else stated.device_bytes
    granted, who = granted_bytes()
    granted //= ranks
    most = round(GRANTED_SHARE * granted)
    if asked is None or asked <= most:
        return stated, ()
    lowered = replace(stated, host_bytes=most) if tier == "host" else replace(stated, device_bytes=most)
    return lowered, (
        f"{tier} memory lowered from the {format_bytes(asked)} that were stated to {format_bytes(most)}: {who} grants this "
        f"process {format_bytes(granted)}, and {1 - GRANTED_SHARE:.0%} is left to the kernel; else the system kills it",
    )


def free_bytes(profile: DeviceProfile) -> FreeBytes:
    """The bytes that this machine has left; of a GPU all it has, since asking it would need torch."""
    disk = shutil.disk_usage(".").free
    if kind_of(profile.device_type).host_is_below:
        return FreeBytes(device=profile.memory_bytes, host=available_bytes(), disk=disk)
    return FreeBytes(device=available_bytes(), disk=disk)


def planned_budget(stated: Budget, device: torch.device, *, ranks: int = 1) -> tuple[Budget, str]:
    """The budget that the plan must fit, and where it comes from: as stated, or what is free now less a margin.

    Ranks of one machine share its RAM, and what is free of it is divided among them.
    """
    if stated.device_bytes is not None:
        return stated, "as stated"
    from lopt_edge.run.device import device_of

    host_is_below = kind_of(device.type).host_is_below
    free = device_of(device).free_bytes() // (1 if host_is_below else ranks)
    planned = replace(stated, device_bytes=round(FREE_SHARE * free))
    if host_is_below and stated.host_bytes is None:
        planned = replace(planned, host_bytes=round(FREE_SHARE * available_bytes() / ranks))
    each = "" if ranks == 1 or host_is_below else f", for each of {ranks} ranks"
    return planned, f"no budget was stated: {FREE_SHARE:.0%} of the {format_bytes(free)} that are free now{each}"
