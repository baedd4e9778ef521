"""`--boundary auto`: it measures candidates on the data, says why it chose, and the run is as if that had been given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lopt_edge import finetune
from lopt_edge.errors import InputError
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.boundary_probe import candidates
from lopt_edge.training.session.progress import Progress
from tools.tiny_runs import make_config, make_model


class Listener(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_the_candidates():
    assert candidates(24) == [(12,), (6,), (18,), (8, 16)]
    assert candidates(3) == [(2,), (1,), (1, 2)]
    assert candidates(1) == []


def test_the_best_candidate_is_taken_and_said(model, tmp_path):
    listener = Listener()
    config = make_config(model, tmp_path, boundary="auto", max_steps=3, n_rows=12)
    finetune(config, listener)
    found = json.loads((Path(config.output) / "boundary.json").read_text())
    best = max(found, key=lambda probe: probe["earned"])
    for probe in found:
        gain = (probe["before"] - probe["after"]) / (probe["step_seconds"] * probe["device_bytes"] / 2**30)
        assert probe["earned"] == pytest.approx(gain)
    assert max(probe["device_bytes"] for probe in found) < 1.05 * min(probe["device_bytes"] for probe in found)
    chosen = next(note for note in listener.notes if note.startswith("boundary chosen"))
    assert ", ".join(map(str, best["boundary_layers"])) in chosen
    assert len(found) == len(candidates(4)) == 4
    assert not list(tmp_path.glob(".boundary-probe-*")), "the short runs leave nothing"
    same = make_config(model, tmp_path, output="same", max_steps=3, n_rows=12, boundary_layers=best["boundary_layers"])
    finetune(same)
    assert (Path(same.output) / ADAPTER_NAME).read_bytes() == (Path(config.output) / ADAPTER_NAME).read_bytes()
    finetune(config.model_copy(update={"resume": "auto", "max_steps": 4}), again := Listener())
    assert not any("candidates" in note for note in again.notes), "a resumed run probes nothing"


@pytest.mark.parametrize(("settings", "match"), [
    ({"boundary_layers": 2}, "given too"), ({"num_segments": 3}, "given too"), ({"method": "e2e"}, "belongs to"),
])  # fmt: skip
def test_what_contradicts_it_is_refused(model, tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        make_config(model, tmp_path, boundary="auto", **settings)


def test_where_no_folder_can_be_made_it_says_so(model, tmp_path):
    """/proc takes no folder, whoever asks."""
    with pytest.raises(InputError, match="beside the output"):
        finetune(make_config(model, tmp_path, boundary="auto", max_steps=3).model_copy(update={"output": "/proc/no/out"}))


def test_a_config_made_in_python_is_checked_too(model, tmp_path):
    config = make_config(model, tmp_path, boundary="auto", max_steps=3).model_copy(update={"method": "e2e"})
    with pytest.raises(InputError, match="boundary: belongs to method lopt"):
        finetune(config)
    assert not Path(config.output).exists()
