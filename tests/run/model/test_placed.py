"""Norms of ours in the place of a family's: a family's record says rightly whether they are plain, and torch's one kernel
computes what the module computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._decomp.decompositions import _fused_rms_norm_backward
from transformers import AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.plan.facts.families import family_of
from lopt_edge.run.model import tiled
from lopt_edge.run.model.tiled import TokenTiled
from tools.tiny_models import FAMILIES, tiny_config

WIDTH = 64


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_whether_its_norms_are_plain(family):
    config: AutoConfig = tiny_config(family)
    layers = AutoModel.from_config(config).layers
    norms = [module for module in layers.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms
    for norm in norms if family_of(family).plain_norms else ():
        norm.weight.data.add_(torch.randn_like(norm.weight))
        x = torch.randn(3, norm.weight.numel())
        expected = torch.nn.functional.rms_norm(x, x.shape[1:], norm.weight, tiled._epsilon(norm))
        assert torch.allclose(norm(x), expected, rtol=1e-5, atol=1e-6), type(norm).__name__


@pytest.mark.parametrize("rows_a_tile", [7, 100])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_one_kernel_computes_the_norm(monkeypatch, dtype, bound, rows_a_tile):
    """By its parts, which torch has for the CPU."""
    kind = replace(CPU, fuses_norms=True, norm_tile_bytes=rows_a_tile * WIDTH * dtype.itemsize)
    monkeypatch.setattr(tiled, "kind_of", lambda name: kind)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_rms_norm_backward", _fused_rms_norm_backward, "CPU")
        generator = torch.Generator().manual_seed(0)
        x, g, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 10, WIDTH),) * 2 + ((WIDTH,),))
        norm = LlamaRMSNorm(WIDTH).to(dtype)
        norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        leaf = x.requires_grad_()
        expected = [norm(leaf), *torch.autograd.grad(norm(leaf), leaf, g)]
        y = TokenTiled(norm, is_plain=True)(leaf)
        found = [y, *torch.autograd.grad(y, leaf, g)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and (ours - theirs).norm() <= bound * theirs.norm()
