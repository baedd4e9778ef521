"""Profiles: through the file and back, broken files refused with advice, cards turned into rates by the stated rules."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from datetime import date
from pathlib import Path

import pytest

from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.facts.cards import CARDS, find_card
from lopt_edge.plan.facts.profile import (
    DISK_READ,
    DeviceProfile,
    default_cpu_profile,
    load_profile,
    profile_of_card,
    profile_path,
    save_profile,
)

CPU = default_cpu_profile()
MEASURED = replace(CPU, name="Prüfling", measured=date(2026, 11, 21), source='a "test"')


@pytest.mark.parametrize("profile", [MEASURED, *map(profile_of_card, CARDS.values())], ids=lambda profile: profile.name)
def test_round_trip(profile, tmp_path):
    path = tmp_path / "new" / "profile.json"
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"]
    save_profile(replace(profile, name="again"), path)
    assert load_profile(path).name == "again"


def stored(tmp_path: Path, **changes: object) -> Path:
    values = {"version": 1, **MEASURED.as_dict(), **changes}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "left out"}))
    return path


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert "profile" in str(caught.value) and "doctor --measure" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", [known.name for known in fields(DeviceProfile)])
def test_every_field_is_needed(name, tmp_path):
    assert name in refusal(stored(tmp_path, **{name: "left out"})).what
    assert name in refusal(stored(tmp_path, **{name: [1]})).what


@pytest.mark.parametrize(
    "change",
    [
        {"unpack_rate": 0},
        {"unpack_rate": -1.0},
        {"unpack_rate": math.nan},
        {"unpack_rate": math.inf},
        {"unpack_rate": True},
        {"memory_bytes": 0},
        {"memory_bytes": 1.5},
        {"context_bytes": -1},
        {"device_type": "tpu"},
        {"matmul_flops": {}},
        {"matmul_flops": {"bfloat16": 1e9}},
        {"matmul_flops": {"float32": 1e9}},
        {"matmul_flops": {"float32": 1e9, "int3": 1e9}},
        {"attention_by_dtype": {"float32": "fast"}},
        {"measured": "yesterday"},
    ],
    ids=str,
)
def test_implausible_values(change, tmp_path):
    assert next(iter(change)) in refusal(stored(tmp_path, **change)).what


def test_all_faults_together(tmp_path):
    with pytest.raises(InputErrors) as caught:
        load_profile(stored(tmp_path, unpack_rate=0, disk_read="left out"))
    assert len(caught.value.errors) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', '{"version": 2}', "\x00", "[" * 10_000])
def test_broken_files(text, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(text)
    refusal(path)
    path.write_bytes(b"\xff\xfe")
    refusal(path)


def test_no_file(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "profile.json").what
    assert "cannot be read" in refusal(tmp_path.rename(tmp_path.with_name("profile"))).what


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_profile(MEASURED, tmp_path / "file" / "profile.json")


def test_path(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "my host/1")
    assert profile_path(tmp_path) == tmp_path / "profile-my-host-1.json"
    assert profile_path().parent == Path.home() / ".cache" / "lopt-edge"


def test_default_cpu():
    assert CPU.matmul_flops == {"float32": 126e9, "bfloat16": 42e9}
    assert 4096**2 / CPU.unpack_rate == pytest.approx(11.3e-3)
    assert CPU.measured is None and CPU.library_bytes > 0 and CPU.context_bytes == 0


def test_rates_of_a_card():
    profile = profile_of_card(CARDS["RTX 4090"])
    assert profile.device_type == "cuda" and profile.measured is None
    assert profile.matmul_flops["bfloat16"] == pytest.approx(0.55 * 165.2e12, rel=1e-2)
    assert profile.flops(2) == profile.matmul_flops["bfloat16"] > 2 * profile.flops(4) * 0.99
    assert 100e9 < profile.unpack_rate < CARDS["RTX 4090"].memory_bandwidth
    assert profile.memory_bytes == CARDS["RTX 4090"].memory_bytes


def test_before_bf16():
    turing, gtx = profile_of_card(CARDS["RTX 2070"]), profile_of_card(CARDS["GTX 1660 Ti"])
    assert turing.flops(2) == turing.matmul_flops["float16"] > 5 * turing.matmul_flops["bfloat16"]
    assert gtx.matmul_flops["float16"] < gtx.matmul_flops["bfloat16"] < gtx.flops(4)  # it has no tensor cores


@pytest.mark.parametrize("name", ["M3 Max", "CPU"])
def test_computed_on_the_cpu(name):
    card = find_card(name)
    assert card is not None
    profile = profile_of_card(card)
    assert (profile.device_type, profile.memory_bytes, profile.matmul_flops) == ("cpu", card.memory_bytes, CPU.matmul_flops)


def test_tiers():
    gpu = profile_of_card(CARDS["RTX 4060 Laptop"])
    assert gpu.up("device") == gpu.down("device") == math.inf
    assert gpu.up("host") == gpu.copy_up_pinned > gpu.up("disk") == gpu.file_read == DISK_READ
    assert gpu.down("disk") == gpu.disk_write < gpu.down("host")
    slow_link = replace(gpu, copy_up_pinned=1e6)
    assert slow_link.up("disk") == 1e6
    assert CPU.up("disk") == CPU.disk_read and CPU.down("disk") == CPU.disk_write


@pytest.mark.parametrize("profile", [CPU, MEASURED, profile_of_card(CARDS["RTX 4090"])], ids=lambda profile: profile.name)
def test_described(profile):
    shown = dict(profile.described())
    assert ("pageable" in " ".join(shown)) == (profile.device_type == "cuda")
    assert ("2026-11-21" in shown["device"]) == (profile.measured is not None)
    assert all(text and "\n" not in text for text in shown.values())
