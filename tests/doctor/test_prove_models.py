"""Whole tiny models and runs of `lopt-edge doctor --prove`, rehearsed on the CPU: what is wrong is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lopt_edge.doctor import prove_models
from lopt_edge.doctor.prove_models import model_proofs
from lopt_edge.doctor.prove_runs import LENGTHS, run_proofs
from lopt_edge.plan.facts.families import FAMILIES
from lopt_edge.run.device import device_of

OWN = device_of(torch.device("cpu"))


def proofs():
    return {name: (bound, work) for name, bound, work in model_proofs(OWN)}


def test_each_family_and_tier_has_a_proof():
    names = [*proofs()]
    assert all(any(f"tiny {family}, float32" in name for name in names) for family in FAMILIES)
    assert [name for name in names if "disk" in name] == [
        f"a step with all on the disk, activations {what}" for what in ("page", "recompute")
    ]


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_a_tiny_model_is_proved(family):
    bound, work = proofs()[f"gradients of a tiny {family}, float32"]
    assert 0 < work() <= bound / 5, "an error of 0 proves nothing"


def test_a_wrong_layer_is_found(monkeypatch):
    """One norm of the model under proof is a hundredth too large."""
    real = prove_models.load_model

    def wrong(*arguments, **named):
        model = real(*arguments, **named)
        if "mover" in named:
            model.layers[1].input_layernorm.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(prove_models, "load_model", wrong)
    bound, work = proofs()["gradients of a tiny llama, float32"]
    assert work() > bound


def test_a_tier_gives_back_the_same_bits(monkeypatch):
    bound, work = proofs()["a step with all on the disk, activations page"]
    assert work() == bound == 0.0
    monkeypatch.setattr(prove_models, "replace", lambda one, **changes: replace(one, **changes) if "weights" not in changes
                        else replace(one, **(changes | {"mlp_block": 64})))  # fmt: skip
    assert work() > 0.0, "steps are compared, not a step with itself"


@pytest.mark.long
def test_all_families_and_runs():
    for name, (bound, work) in proofs().items():
        assert work() <= bound, name
    for name, bound, work in run_proofs(OWN):
        share = work()
        assert share <= bound and (bound < 1 or share > 0.5), name
    assert len(LENGTHS) == 4
