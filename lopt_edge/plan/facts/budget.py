"""The budget: how many bytes of each tier a person allows, read from what they wrote.

A budget is one number per tier: device, host, disk, and the part of the host that may be page-locked (pinned). None
means that it was not stated: what then holds is decided by who plans, not here. An amount is written as bytes with a
unit, decimal (24GB = 24 * 10**9, also 24G) or binary (24GiB = 24 * 2**30), or as a percentage of what is free (80%).
The rule: an amount without a unit is refused, not guessed, since a wrong guess is wrong by a factor of 10**9; so are
zero, and a percentage of free bytes that nobody knows. Arithmetic is exact (fractions) and rounds down, so that a budget
is never larger than what was written.

It asks no machine: free bytes come in as `FreeBytes`. It does not say whether a run fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopt_edge.errors import InputError, raise_collected
from lopt_edge.units import parse_bytes


@dataclass(frozen=True)
class FreeBytes:
    """The bytes that are free on each tier now; None where that is not known (percentages are refused there)."""

    device: int | None = None
    host: int | None = None
    disk: int | None = None
    pinned: int | None = None


@dataclass(frozen=True)
class Budget:
    """The bytes allowed on each tier; None: not stated. `pinned_bytes` is a part of `host_bytes`, not added to it."""

    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    pinned_bytes: int | None = None


def make_budget(
    *,
    device_memory: str | None,
    host_memory: str | None,
    disk_memory: str | None,
    pinned_memory: str | None,
    free: FreeBytes,
) -> Budget:
    """The budget as written. Raises InputError(s): every amount that cannot be read is shown, all of them together."""
    errors: list[InputError] = []

    def read(text: str | None, free_bytes: int | None, where: str) -> int | None:
        try:
            return None if text is None else parse_bytes(text, free_bytes=free_bytes, where=where)
        except InputError as error:
            errors.append(error)
            return None

    budget = Budget(
        device_bytes=read(device_memory, free.device, "device_memory"),
        host_bytes=read(host_memory, free.host, "host_memory"),
        disk_bytes=read(disk_memory, free.disk, "disk_memory"),
        pinned_bytes=read(pinned_memory, free.pinned, "pinned_memory"),
    )
    raise_collected(errors)
    return budget
