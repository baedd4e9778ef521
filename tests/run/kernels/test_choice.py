"""Whose kernels a run takes, and why; and where our rotary kernel stands in for a family's function."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as of_neighbours
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.device_kinds import CUDA
from lopt_edge.run.kernels import choice
from lopt_edge.run.kernels.choice import choose_kernels, why_not
from lopt_edge.run.model.rotated import rotate_by_kernel, turns_halves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A card in words: its capability, whether Triton is there, what its kernels raise and how far off they are."""
    found = SimpleNamespace(capability="8.9", triton=True, fault=None, error=1e-4)

    def work():
        if found.fault is not None:
            raise found.fault
        return found.error

    device = SimpleNamespace(
        kind=CUDA,
        capability=lambda: found.capability,
        auto_dtype=lambda: (torch.bfloat16, ""),
        made_current=torch.no_grad,
        settle_allocator=lambda: None,
    )
    monkeypatch.setattr(choice, "device_of", lambda _: device)
    monkeypatch.setattr(choice, "find_spec", lambda name: found.triton or None)
    monkeypatch.setattr(choice, "version", lambda name: "3.9.0")
    monkeypatch.setattr(choice, "kernel_checks", lambda device, dtype: [("norm", work)])
    why_not.cache_clear()
    yield found
    why_not.cache_clear()


def test_a_cpu_has_torchs():
    assert choose_kernels("auto", CPU) == ("torch", "our own kernels are for a GPU, not for a CPU")
    assert choose_kernels("torch", CPU) == ("torch", "asked for")
    with pytest.raises(InputError, match=r"(?s)kernels: our own kernels are for a GPU.*--kernels torch"):
        choose_kernels("triton", CPU)
    with pytest.raises(InputError, match="'cutlass' is unknown"):
        choose_kernels("cutlass", CPU)


def test_a_listed_card_has_ours_and_says_that_none_has_run_them(card):
    assert choose_kernels("auto", GPU)[0] == choose_kernels("triton", GPU)[0] == "triton"
    assert "run on no GPU yet" in choose_kernels("auto", GPU)[1]
    assert choose_kernels("torch", GPU) == ("torch", "asked for")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capability": "6.1"}, "no card of compute capability 6.1"),
        ({"triton": False}, "Triton is not installed"),
        (
            {"fault": RuntimeError("Failed to find C compiler\nCC=?")},
            "a kernel of Triton failed: RuntimeError: Failed to",
        ),
        ({"error": 0.3}, "other numbers than torch's here: norm by 3.0e-01"),
        ({"error": float("nan")}, "norm by nan"),
    ],
)
def test_what_keeps_ours_away(card, changes, words):
    vars(card).update(changes)
    name, reason = choose_kernels("auto", GPU)
    assert name == "torch" and words in reason
    with pytest.raises(InputError, match=words):
        choose_kernels("triton", GPU)


def test_only_a_function_that_turns_halves_is_stood_in_for():
    assert turns_halves(apply_rotary_pos_emb) and not turns_halves(of_neighbours) and not turns_halves(lambda x: x)


def test_a_familys_class_stays_as_it_is():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    layer, forward = torch.nn.Sequential(LlamaAttention(config, 0)), LlamaAttention.forward
    assert rotate_by_kernel(layer) and isinstance(layer[0], LlamaAttention) and type(layer[0]) is not LlamaAttention
    assert LlamaAttention.forward is forward and forward.__globals__["apply_rotary_pos_emb"] is apply_rotary_pos_emb
