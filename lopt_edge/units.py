"""Bytes in words, both ways: "24GB" and "8 GiB" to bytes, bytes to the shortest true words.

The rule: what a user may write is defined once, here, and what is printed can be written back. Shares ("80%") need to know
of what; who asks names it. It knows no device and no budget.
"""

from __future__ import annotations

import re
from fractions import Fraction

from lopt_edge.errors import InputError

_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
UNITS = {"B": 1, **_DECIMAL, **{f"{unit}B": size for unit, size in _DECIMAL.items()}, **_BINARY}
MOST_BYTES = 2**60  # an exbibyte: more is a slip of the keyboard
_AMOUNT = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))\s*([A-Za-z]*|%)")
_LONGEST = 40  # characters; keeps absurd numbers out of the arithmetic and of the message
_FORMS = "write bytes with a unit (24GB, 16GiB, 500MB, 1.5TB) or a share of what is free (80%)"


def parse_bytes(text: str, *, free_bytes: int | None, where: str) -> int:
    """The bytes of `24GB`, `16 GiB`, `24G` or `80%` (of `free_bytes`), rounded down; `where` names the setting in errors.
    Raises InputError."""
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
    """The bytes in words for messages: `1.5 GiB`, `512 MiB`; below one MiB the bytes themselves."""
    if abs(n_bytes) >= 2**30:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if abs(n_bytes) >= 2**20 else f"{n_bytes:,} bytes"
