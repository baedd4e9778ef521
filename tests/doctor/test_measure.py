"""A short measurement of this machine, for real: every rate there, plausible, and nothing left on the disk."""

from __future__ import annotations

import json
import time

import pytest
from typer.testing import CliRunner

from lopt_edge.cli.main import app
from lopt_edge.doctor import measure
from lopt_edge.doctor.measure import measure_profile
from lopt_edge.errors import InputError
from lopt_edge.plan.facts.profile import default_cpu_profile, load_profile, profile_path


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    found = measure_profile("cpu", seconds=2, page_dir=folder)
    assert list(folder.iterdir()) == []
    return found


def test_rates_are_plausible(profile):
    """Within what the slowest and the fastest machines do; a busy one is slow."""
    assert profile.device_type == "cpu" and profile.measured is not None
    assert set(profile.matmul_flops) == set(profile.attention_by_dtype) == {"float32", "bfloat16"}
    for flops in (*profile.matmul_flops.values(), *profile.attention_by_dtype.values(), profile.attention_flops):
        assert 1e8 < flops < 1e14
    assert 1e6 < profile.unpack_rate < 1e12
    assert 1e8 < profile.memory_bandwidth < 1e12
    assert 1e6 < profile.disk_write < 1e11 and 1e6 < profile.disk_read < 1e11
    assert 1e-5 < profile.op_overhead_seconds < 1
    assert profile.memory_bytes > 1 << 29 and profile.library_bytes > 64 << 20 and profile.context_bytes == 0


def test_median_of_batches():
    import torch

    calls = []

    def call() -> None:
        calls.append(time.sleep(0.2 if len(calls) == 5 else 0.002))

    assert 0.002 <= measure._seconds_per_call(call, torch.device("cpu"), 0.1) < 0.05
    assert len(calls) >= 6


def test_shares_add_up():
    allowed = measure._clock(10)
    assert sum(measure.SHARES.values()) == pytest.approx(1)
    assert allowed("products") == pytest.approx(2.7, rel=0.01)
    assert allowed("disk") == pytest.approx(9, rel=0.01)  # the last one may take all that is left
    assert measure._clock(-1)("disk") == 0


@pytest.mark.parametrize(
    ("code", "n_bytes"),
    [("print('noise', 300 << 20)", 300 << 20), ("print(1 << 20)", None), ("print('?')", None), ("1 / 0", None)],
)
def test_fresh_process(code, n_bytes, monkeypatch):
    import torch

    monkeypatch.setattr(measure, "_LIBRARIES", code)
    assert measure._fixed_bytes(torch.device("cpu")) == n_bytes


@pytest.mark.long
def test_libraries():
    import torch

    assert 150 << 20 < measure._fixed_bytes(torch.device("cpu")) < 1 << 30


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        measure._disk(tmp_path / "file", 0.1, fraction=0.1)


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda folder: measure.shutil._ntuple_diskusage(1, 1, 0))
    assert "too full" in measure._disk(tmp_path, 0.1, fraction=0.1)[2]


def test_unknown_device():
    with pytest.raises(InputError, match="cannot be measured"):
        measure_profile("meta", seconds=1)


@pytest.mark.parametrize("options", [["--measure"], ["--measure", "--json"]], ids=" ".join)
def test_doctor_stores_and_shows(options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(measure, "measure_profile", lambda device: default_cpu_profile())
    done = CliRunner().invoke(app, ["doctor", *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert profile_path().is_relative_to(tmp_path) and load_profile(profile_path()) == default_cpu_profile()
    if "--json" in options:
        found = json.loads(done.stdout)
        assert found["profile"]["path"] == str(profile_path()) and found["profile"]["unpack_rate"] > 0
    else:
        assert "126 GFLOP/s" in done.stdout and profile_path().name in done.stdout.replace("\n", "")
