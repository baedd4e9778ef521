"""The task loss in chunks of the vocabulary and tiles of tokens against torch's cross-entropy in float64; LoPT's aux head.

Gradients are compared as relative errors of the whole tensor: fp32 arithmetic may differ in the last bits, bfloat16 rows
are multiplied in bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.run.model.vocabulary import Vocabulary
from lopt_edge.run.step import losses
from lopt_edge.run.step.losses import LogitForm, ReconstructHead, online_cross_entropy
from quant.headers import read_header
from tests.laws.bench import make_bench, random_batch
from tests.plan.plans import make_knobs

N_TOKENS, HIDDEN, VOCABULARY = 37, 48, 101
FORMS = [LogitForm(), LogitForm(factor=0.25), LogitForm(soft_cap=2.0), LogitForm(factor=3.0, soft_cap=5.0)]


def make_head(folder, dtype: torch.dtype, *, scale: float = 0.5, resident: bool = False) -> tuple[Vocabulary, Tensor]:
    matrix = (torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    save_file({"w": matrix}, folder / "x.safetensors")
    entry = read_header(folder / "x.safetensors")["w"]
    return Vocabulary(entry, device=torch.device("cpu"), dtype=dtype, resident=resident), matrix


def by_torch(hidden_ND: Tensor, targets_N: Tensor, matrix_VD: Tensor, form: LogitForm) -> tuple[Tensor, Tensor]:
    leaf = hidden_ND.double().requires_grad_()
    scores = leaf @ matrix_VD.double().t() * form.factor
    if form.soft_cap is not None:
        scores = form.soft_cap * torch.tanh(scores / form.soft_cap)
    loss = torch.nn.functional.cross_entropy(scores, targets_N, reduction="sum")
    loss.backward()
    return loss.detach(), leaf.grad


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(N_TOKENS, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (N_TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, VOCABULARY - 1])
    return hidden, targets


@pytest.mark.parametrize("chunk", [1, 10, 50, VOCABULARY, 8192])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_cross_entropy(tmp_path, monkeypatch, tokens, dtype, form, chunk):
    monkeypatch.setattr(losses, "kind_of", lambda name: replace(CPU, vocabulary_chunk=chunk))
    hidden, targets = tokens[0].to(dtype), tokens[1]
    head, matrix = make_head(tmp_path, dtype)
    loss, gradient = online_cross_entropy(hidden, targets, head, form=form, need_grad=True)
    expected_loss, expected = by_torch(hidden, targets, matrix, form)
    tight = dtype == torch.float32
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert relative(loss, expected_loss) <= (1e-6 if tight else 5e-3)
    assert relative(gradient, expected) <= (1e-5 if tight else 2e-2)
    alone, nothing = online_cross_entropy(hidden, targets, head, form=form, need_grad=False)
    assert nothing is None
    assert torch.equal(alone, loss)


def test_huge_and_tiny_logits_neither_overflow_nor_vanish(tmp_path, monkeypatch, tokens):
    """The running maximum: logits of hundreds, growing from chunk to chunk and shrinking."""
    monkeypatch.setattr(losses, "kind_of", lambda name: replace(CPU, vocabulary_chunk=7))
    hidden, targets = tokens
    head, matrix = make_head(tmp_path, torch.float32, scale=30.0)
    loss, gradient = online_cross_entropy(hidden, targets, head, form=LogitForm(), need_grad=True)
    expected_loss, expected = by_torch(hidden, targets, matrix, LogitForm())
    assert expected_loss / N_TOKENS > 100
    assert relative(loss, expected_loss) <= 1e-6
    assert relative(gradient, expected) <= 1e-5


def test_no_token(tmp_path, tokens):
    head, _ = make_head(tmp_path, torch.float32)
    loss, gradient = online_cross_entropy(tokens[0][:0], tokens[1][:0], head, form=LogitForm(), need_grad=True)
    assert loss.item() == 0.0
    assert gradient.shape == (0, HIDDEN)


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_tiles_of_tokens_change_nothing_but_rounding(four_bit, tile):
    """The executor's tiles: gradients of a step and the evaluation loss, with tiles smaller than a batch."""
    batch = random_batch((13, 9))
    bench = make_bench(four_bit())
    whole, loss = bench.gradients([batch]), bench.evaluate([batch])
    assert loss == pytest.approx(bench.result.loss, rel=1e-6)
    tiled = make_bench(four_bit(), knobs=make_knobs(4, token_tile=tile)).gradients([batch])
    assert bench.evaluate([batch], token_tile=tile) == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        assert (tiled[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen2"])
def test_logits_for_a_few_tokens_agree_with_the_loss(four_bit, family):
    """Cross-entropy of `logits` is `task_loss`, with the family's factor and soft cap."""
    model = make_bench(four_bit(family)).model
    hidden = torch.randn(5, model.facts.hidden_size, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([3, 0, 319, 7, 100])
    expected = torch.nn.functional.cross_entropy(losses.logits(model, hidden), targets, reduction="sum")
    assert losses.task_loss(model, hidden, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_aux_head_is_that_of_the_paper():
    """LayerNorm -> Linear(d, d // 4) -> GELU -> Linear(d // 4, d), xavier-uniform with gain 0.1, zero bias, fp32."""
    head = ReconstructHead(64, seed=5)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "norm.weight": (64,),
        "norm.bias": (64,),
        "down.weight": (16, 64),
        "down.bias": (16,),
        "up.weight": (64, 16),
        "up.bias": (64,),
    }
    assert all(p.dtype == torch.float32 for p in head.parameters())
    bound = 0.1 * math.sqrt(6 / (64 + 16))
    for linear in (head.down, head.up):
        assert not linear.bias.any()
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    output, target = torch.randn(2, 7, 64).to(torch.bfloat16)
    x = torch.nn.functional.layer_norm(output.double(), (64,), head.norm.weight.double(), head.norm.bias.double())
    hidden = torch.nn.functional.gelu(x @ head.down.weight.double().t())
    expected = (hidden @ head.up.weight.double().t() - target.double()).square().sum()
    loss = head(output, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(head.up.weight, ReconstructHead(64, seed=5).up.weight)
    assert not torch.equal(head.up.weight, ReconstructHead(64, seed=6).up.weight)
