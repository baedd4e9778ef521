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

import re
from dataclasses import dataclass
from fractions import Fraction

from lopt_edge.errors import InputError, raise_collected

_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
UNITS = {"B": 1, **_DECIMAL, **{f"{unit}B": size for unit, size in _DECIMAL.items()}, **_BINARY}
MOST_BYTES = 2**60  # an exbibyte: more is a slip of the keyboard
_AMOUNT = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))\s*([A-Za-z]*|%)")
_LONGEST = 40  # characters; keeps absurd numbers out of the arithmetic and of the message
_FORMS = "write bytes with a unit (24GB, 16GiB, 500MB, 1.5TB) or a share of what is free (80%)"


@dataclass(frozen=True)
class FreeBytes:
    """What is free per tier now; None where that is not known (percentages are refused there)."""

    device: int | None = None
    host: int | None = None
    disk: int | None = None
    pinned: int | None = None


@dataclass(frozen=True)
class Budget:
    """Bytes allowed per tier; None: not stated. `pinned_bytes` is a part of `host_bytes`, not added to it."""

    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    pinned_bytes: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether no tier has a budget."""
        return self.device_bytes is None and self.host_bytes is None and self.disk_bytes is None


def make_budget(
    *,
    device_memory: str | None,
    host_memory: str | None,
    disk_memory: str | None,
    pinned_memory: str | None,
    free: FreeBytes,
) -> Budget:
    """The budget as written; every amount that cannot be read is told, all of them together."""
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


def parse_bytes(text: str, *, free_bytes: int | None, where: str) -> int:
    """Bytes from `24GB`, `16 GiB`, `24G` or `80%` (of `free_bytes`), rounded down; `where` names the setting in errors."""
    shown = repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
    found = _AMOUNT.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if found is None:
        raise InputError(f"{shown} is not an amount of memory", where=where, fix=_FORMS)
    amount, unit = Fraction(found[1]), found[2].upper()
    if not unit:
        raise InputError(f"{shown} has no unit", where=where, fix=_FORMS)
    if unit != "%" and unit not in UNITS:
        raise InputError(f"{shown} has the unit {found[2]!r}, which is not known", where=where, fix=_FORMS)
    if amount <= 0:
        raise InputError(f"{shown} must be more than zero", where=where, fix=f"leave it out, or {_FORMS}")
    n_bytes = int(_share(amount, shown, free_bytes, where) if unit == "%" else amount * UNITS[unit])
    if n_bytes < 1:
        raise InputError(f"{shown} comes to less than one byte", where=where, fix=_FORMS)
    if n_bytes > MOST_BYTES:
        raise InputError(f"{shown} is more than any machine has", where=where, fix=_FORMS)
    return n_bytes


def _share(percent: Fraction, shown: str, free_bytes: int | None, where: str) -> Fraction:
    if percent > 100:
        raise InputError(f"{shown} is more than what is free", where=where, fix="write at most 100%, or " + _FORMS)
    if free_bytes is None:
        raise InputError(f"{shown}: how much is free is not known here", where=where, fix="write bytes: 24GB, 16GiB, 500MB")
    return percent * free_bytes / 100


def format_bytes(n_bytes: int) -> str:
    """For messages: `1.5 GiB`, `512 MiB`; below one MiB the bytes themselves."""
    if abs(n_bytes) >= 2**30:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if abs(n_bytes) >= 2**20 else f"{n_bytes:,} bytes"
