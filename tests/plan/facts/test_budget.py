"""Amounts of memory as people write them: exact where they can be read, refused with the accepted forms where not."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.facts.budget import Budget, FreeBytes, make_budget
from lopt_edge.units import UNITS, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("24GB", 24 * 10**9),
        ("24 GB", 24 * 10**9),
        ("  24gb ", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("16M", 16 * 10**6),
        ("16GiB", 16 * 2**30),
        ("16gib", 16 * 2**30),
        ("500MB", 500 * 10**6),
        ("512MiB", 512 * 2**20),
        ("1.5TB", 1_500_000_000_000),
        ("2TiB", 2 * 2**40),
        ("800KB", 800_000),
        ("4KiB", 4096),
        ("1000B", 1000),
        (".5 GiB", 2**29),
        ("0.1GB", 100_000_000),  # exactly, which a float is not
        ("80%", 800),
        ("12.34 %", 123),
        ("100%", 1000),
    ],
)
def test_reads(text, n_bytes):
    assert parse_bytes(text, free_bytes=1000, where="device_memory") == n_bytes


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("24", "has no unit"),
        ("0GB", "more than zero"),
        ("-1GB", "more than zero"),
        ("0%", "more than zero"),
        ("0.5B", "less than one byte"),
        ("0.01%", "less than one byte"),
        ("101%", "more than what is free"),
        ("24GBit", "unit 'GBit'"),
        ("3PB", "unit 'PB'"),
        ("16Gi", "unit 'Gi'"),
        ("", "not an amount"),
        ("GB", "not an amount"),
        ("24,5GB", "not an amount"),
        ("1e3MB", "not an amount"),
        ("inf GB", "not an amount"),
        ("٢٤GB", "not an amount"),
        ("12GB 4MB", "not an amount"),
        ("80%GB", "not an amount"),
        ("9" * 5000 + "GB", "not an amount"),
        ("9" * 30 + "GB", "more than any machine"),
    ],
)
def test_refuses(text, what):
    with pytest.raises(InputError) as caught:
        parse_bytes(text, free_bytes=1000, where="host_memory")
    assert what in caught.value.what and caught.value.where == "host_memory"
    assert all(form in caught.value.fix for form in ("24GB", "16GiB", "80%"))
    assert len(str(caught.value)) < 400


def test_percentage_of_what_nobody_knows():
    with pytest.raises(InputError, match="not known") as caught:
        parse_bytes("80%", free_bytes=None, where="disk_memory")
    assert "16GiB" in caught.value.fix and "%" not in caught.value.fix
    with pytest.raises(InputError, match="less than one byte"):
        parse_bytes("80%", free_bytes=0, where="disk_memory")


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]), st.booleans())
def test_whole_amounts_are_exact(amount, unit, space, lower):
    text = f"{amount}{space}{unit}"
    expected = amount * UNITS[unit]
    assert parse_bytes(text.lower() if lower else text, free_bytes=None, where="here") == expected


@given(st.text(max_size=12))
def test_any_text_ends_in_bytes_or_an_input_error(text):
    with suppress(InputError):
        assert parse_bytes(text, free_bytes=10**9, where="here") > 0


def test_budget():
    free = FreeBytes(device=1000, host=2000, disk=None, pinned=400)
    made = make_budget(device_memory="50%", host_memory=None, disk_memory="1GB", pinned_memory="25%", free=free)
    assert made == Budget(device_bytes=500, host_bytes=None, disk_bytes=10**9, pinned_bytes=100)
    assert (
        make_budget(device_memory=None, host_memory=None, disk_memory=None, pinned_memory=None, free=FreeBytes())
        == Budget()
    )


def test_all_mistakes_together():
    with pytest.raises(InputErrors) as caught:
        make_budget(device_memory="24", host_memory="8GB", disk_memory="80%", pinned_memory="-1G", free=FreeBytes(device=9))
    assert [error.where for error in caught.value.errors] == ["device_memory", "disk_memory", "pinned_memory"]
    with pytest.raises(InputError) as alone:
        make_budget(device_memory="24", host_memory=None, disk_memory=None, pinned_memory=None, free=FreeBytes())
    assert not isinstance(alone.value, InputErrors)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (4096, "4,096 bytes"), (2**20, "1 MiB"), (1000 * 2**20, "1000 MiB"), (3 * 2**29, "1.5 GiB"),
     (-(2**31), "-2.0 GiB")],
)  # fmt: skip
def test_format(n_bytes, text):
    assert format_bytes(n_bytes) == text
