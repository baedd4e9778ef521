"""`lopt-edge doctor --prove`: a sound device passes all, a wrong one is found out and named."""

from __future__ import annotations

import json

import pytest
import torch

from lopt_edge.doctor import prove as proofs
from lopt_edge.doctor.prove import prove
from lopt_edge.run.device import device_of

CPU = torch.device("cpu")


def test_this_machine_is_proved(command, monkeypatch):
    for later in ("model_proofs", "run_proofs"):  # tests/doctor/test_prove_models.py
        monkeypatch.setattr(proofs, later, lambda own: iter([]))
    code, out, _ = command("doctor", "--prove", "--json")
    found = json.loads(out)["proofs"]
    assert code == 0 and all(one["passed"] for one in found), found
    names = {one["name"] for one in found}
    assert {
        "attention, torch, float32",
        "whole MLP on 4 bits, bfloat16",
        "norm, float32",
        "movements to disk and back",
    } <= names
    assert all(0 < one["error"] <= one["bound"] for one in found if one["bound"]), "an error of 0 proves nothing"


@pytest.mark.parametrize(
    ("broken", "named"),
    [("silu", "blocked MLP on 4 bits, float32"), ("is_out_of_memory", "a budget that refuses")],
)
def test_what_is_wrong_is_named(monkeypatch, broken, named):
    wrong = {"silu": torch.relu, "is_out_of_memory": lambda error: False}[broken]
    if broken == "silu":  # the device computes another function than the reference
        real = proofs.PackedGatedMLP
        monkeypatch.setattr(proofs, "PackedGatedMLP", lambda *parts, pieces: real(*parts[:3], wrong, pieces=pieces))
    else:
        monkeypatch.setattr(proofs, broken, wrong)
    wanted = [(name, bound, work) for name, bound, work in proofs._all(device_of(CPU)) if name == named]
    monkeypatch.setattr(proofs, "_all", lambda own: iter(wanted))
    assert [(proof.name, proof.passed) for proof in prove(CPU)] == [(named, False)]


def test_what_is_raised_is_a_fault(monkeypatch):
    def fail() -> float:
        raise ValueError("no such kernel")

    monkeypatch.setattr(proofs, "_all", lambda own: iter([("a proof", 1.0, fail)]))
    (proof,) = prove(CPU)
    assert not proof.passed and proof.fault == "ValueError: no such kernel"


def test_what_there_was_no_time_for_is_no_proof(monkeypatch):
    monkeypatch.setattr(proofs, "_all", lambda own: iter([("a proof", 1.0, lambda: 0.5)]))
    assert [proof.passed for proof in prove(CPU)] == [True]
    (proof,) = prove(CPU, most_seconds=-1)
    assert not proof.passed and proof.fault == "left out: -1 s are over"
