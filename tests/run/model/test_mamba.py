"""A state space run chunk by chunk against transformers' own module: values, and gradients through several chunks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lopt_edge.models.tiny import smaller
from lopt_edge.run.model.mamba import MambaNet

MIXERS = {"granitemoehybrid": "GraniteMoeHybridMambaLayer", "falcon_h1": "FalconH1Mixer", "bamba": "BambaMixer"}


def make_mixer(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = smaller(AutoConfig.for_model(family), n_layers=2)
    kind: Any = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), MIXERS[family])
    mixer = kind(config, 0).eval()
    for name, parameter in mixer.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = torch.randn(parameter.shape) * scale + (name in ("norm.weight", "D"))
        parameter.requires_grad_("proj" in name)
    if family == "falcon_h1":  # whose decoder layer gives it factors
        mixer.register_buffer("mup_vector", torch.rand(mixer.get_submodule("in_proj").out_features) + 0.5)
    return mixer


@pytest.mark.parametrize(
    ("family", "n_tokens"),
    [("granitemoehybrid", 1), ("granitemoehybrid", 600), ("falcon_h1", 64), ("bamba", 150)],  # 600: a state is kept
)
def test_values_and_gradients_are_those_of_transformers(family, n_tokens):
    mixer = make_mixer(family)
    x = torch.randn(2, n_tokens, 64)
    g, found = torch.randn(2, n_tokens, 64), []
    for net in (mixer, MambaNet(mixer)):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        weights = [mixer.get_submodule(name).get_parameter("weight") for name in ("in_proj", "out_proj")]
        found.append([y, *torch.autograd.grad(y, [leaf, *weights], g)])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()


def test_no_token_sees_a_later_one():
    net, x = MambaNet(make_mixer("granitemoehybrid")), torch.randn(1, 130, 64)
    changed = x.clone()
    changed[:, 100:] = 3.0
    with torch.no_grad():
        torch.testing.assert_close(net(changed)[:, :100], net(x)[:, :100])
