"""Batches that are made while the device computes: a run on a disguised CPU learns what it learns without them.

The CPU stands for a card (its kind has a host tier below it), so the whole command runs through stage and pinned memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lopt_edge import finetune
from lopt_edge.plan.facts import device_kinds
from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.run import device as devices
from lopt_edge.run.devices.host import Host
from lopt_edge.run.model.vocabulary import Vocabulary
from lopt_edge.training.session.ahead import Ahead
from tools.tiny_runs import make_config, make_model, metrics_of


@pytest.fixture
def card(monkeypatch) -> None:
    row = replace(CPU, host_is_below=True)

    class Disguised(Host):
        kind = row

        def pin(self, block: torch.Tensor) -> bool:
            return True

    monkeypatch.setitem(device_kinds.KINDS, "cpu", row)
    monkeypatch.setitem(devices.CLASSES, "cpu", Disguised)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_run_with_batches_ahead_equals_one_without(card, model, tmp_path, monkeypatch):
    seen, take = Counter[str](), Vocabulary._take_ahead

    def taken(self, ids_N):
        found = take(self, ids_N)
        seen["read ahead" if found is not None else "read late"] += 1
        return found

    monkeypatch.setattr(Vocabulary, "_take_ahead", taken)
    ahead = losses(model, tmp_path / "ahead")
    assert seen["read ahead"] == 4, "of five steps all but the first begin with rows that lie there"
    seen.clear()
    monkeypatch.setattr(Ahead, "make_ready", lambda self: None)
    late = losses(model, tmp_path / "late")
    assert seen["read ahead"] == 0 and seen["read late"] and late == ahead


def losses(model: Path, folder: Path) -> list[float]:
    folder.mkdir()
    config = make_config(model, folder, max_steps=5, n_rows=6, batch_size=1, grad_accum=2)  # short windows among them
    finetune(config)
    steps, _ = metrics_of(config)
    return [step["loss"] for step in steps]
