"""Law 2: one segment equals plain autograd on the same Hugging Face model, within fp32 rounding.

The reference knows nothing of ours: AutoModelForCausalLM on the same 4-bit folder, adapters by peft with the same values
(transposed), transformers' own cross-entropy, one `backward()`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lopt_edge.run.model.lora import adapter_tensors
from lopt_edge.run.step.batches import Batch
from tests.laws.bench import Bench, make_bench, random_batch, transformers_model
from tools.tiny_models import FAMILIES

SINGLE = random_batch((19,), seed=1)
PADDED = random_batch((13, 8), seed=2)


def peft_model(folder, bench: Bench) -> torch.nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(bench.model.facts.linear_names))
    model = get_peft_model(transformers_model(folder), config).train()
    values = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter_tensors(bench.model).items()}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert not any("lora_" in name for name in missing)
    return model


def labels_of(batch: Batch) -> torch.Tensor:
    """transformers shifts by itself: the label of a token stands at its own position."""
    labels = torch.full(batch.ids_BT.shape, -100).view(-1)
    labels[batch.supervised_N + 1] = batch.targets_N
    return labels.view(batch.ids_BT.shape)


def reference(model: torch.nn.Module, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by our names: layer i, then A and B of each linear layer in turn, transposed."""
    lengths = torch.tensor([batch.ids_BT.shape[1]] * len(batch.ids_BT))
    if batch.real_N is not None:
        lengths = torch.bincount(batch.real_N // batch.ids_BT.shape[1])
    mask = (torch.arange(batch.ids_BT.shape[1]) < lengths[:, None]).long()
    loss = model(input_ids=batch.ids_BT, attention_mask=mask, labels=labels_of(batch), use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# without padding by default: one of each form of attention and of each kind of layer
ALONE = ("gemma2", "gemma3_text", "gpt_oss", "granitemoehybrid", "llama", "qwen3_5_text", "qwen3_moe")


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        *(pytest.param(one, PADDED, id=f"{one}-padded") for one in sorted(FAMILIES)),
        *(
            pytest.param(one, SINGLE, id=f"{one}-single", marks=() if one in ALONE else pytest.mark.long)
            for one in sorted(FAMILIES)
        ),
    ],
)
def test_end_to_end_gradients_equal_plain_autograd(four_bit, family, batch):
    # tiny delta rules at random are sensitive: 6e-8 of the embedding moves transformers' own gradients by 5e-5 to 9e-5
    check_end_to_end(four_bit(family), batch, bound=2e-4 if family.startswith("qwen3_5") else 2e-5)


def check_end_to_end(folder: Path, batch: Batch, *, bound: float) -> None:
    bench = make_bench(folder, method="e2e")
    ours = bench.gradients([batch])
    facts = bench.model.facts
    loss, theirs = reference(peft_model(folder, bench), batch)
    assert abs(bench.result.loss - loss) <= 1e-5 * loss
    matched = 0
    for layer in range(facts.n_layers):
        adapted = [one for one in facts.layer(layer).linears if one.short_name in facts.linear_names]
        for index, linear in enumerate(adapted):
            for offset, letter in enumerate("AB"):
                mine = ours[f"layer {layer} {2 * index + offset}"]
                name = f"base_model.model.model.layers.{layer}.{linear.name}.lora_{letter}.default.weight"
                expected = theirs.pop(name).t()
                assert expected.norm() > 0
                assert (mine - expected).norm() <= bound * expected.norm(), name
                matched += 1
    assert not theirs, "every gradient of the reference has its counterpart"
    assert matched == len(ours)


def test_lopt_with_one_segment_is_end_to_end(four_bit):
    """k = 1: no local loss, no aux head, the same gradients bitwise."""
    lopt = make_bench(four_bit("qwen2"), method="lopt", num_segments=1)
    e2e = make_bench(four_bit("qwen2"), method="e2e")
    assert not lopt.heads
    ours, theirs = lopt.gradients([PADDED]), e2e.gradients([PADDED])
    assert lopt.result.local_loss == ()
    assert lopt.result.loss == e2e.result.loss
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_above_the_boundary_lopt_is_end_to_end_and_below_it_is_not(four_bit):
    """The boundary changes no forward: the last segment's gradients are those of the whole model, bitwise."""
    ours = make_bench(four_bit(), method="lopt", num_segments=2).gradients([SINGLE])
    theirs = make_bench(four_bit(), method="e2e").gradients([SINGLE])
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient) == (int(name.split()[1]) >= 2), name


def test_frozen_trains_the_last_segment_only(four_bit):
    bench = make_bench(four_bit(), method="frozen", num_segments=2)
    assert {name.split()[1] for name in bench.gradients([SINGLE])} == {"2", "3"}
    names = adapter_tensors(bench.model)
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"2", "3"}
