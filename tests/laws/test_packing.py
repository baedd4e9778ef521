"""Packing: sequences in one row have the losses and gradients that they have in rows of their own.

Attention, delta rules and convolutions run for one sequence at a time, bitwise as alone (tests/run/model). Matrix products
have as many rows as the row has tokens, and a library may sum in another order for another number of
rows: so whole layers agree within rounding, 2e-6 of the largest value in fp32 (Qwen3.5's 1e-5), gradients within 2e-5 of
their norm (law 5's bound). Against one autograd graph over the same row the plan's gradients are bitwise equal, as in
law 1.
"""

from __future__ import annotations

import pytest
import torch

from lopt_edge.run.step.batches import Batch
from lopt_edge.run.tiers.feature_cache import FeatureCache
from tests.laws.bench import in_a_row, make_bench, random_batch
from tests.laws.test_single_graph import reference_loss
from tools.tiny_models import FAMILIES

LENGTHS = (11, 3, 40, 1, 9)
DELTA = {"layer_types": ["linear_attention", "full_attention"] * 2}


def rows_of(lengths: tuple[int, ...], *, seed: int = 0) -> list[Batch]:
    """Random sequences of these lengths, one a micro-batch."""
    return [random_batch((length,), seed=seed + at, prompt=1) for at, length in enumerate(lengths)]


def changes_of(family: str) -> dict[str, object]:
    if family.startswith("qwen3_5"):
        return dict(DELTA)
    return {"sliding_window": 8}  # shorter than the longest sequence


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_computes_a_row_as_its_sequences_alone(four_bit, family):
    model = make_bench(four_bit(family, num_hidden_layers=4, **changes_of(family))).model
    singles = rows_of(LENGTHS)
    with torch.no_grad():
        alone = []
        for batch in singles:
            hidden = model.embed(batch.ids_BT)
            alone.append(model.run_all(hidden, model.layer_context(hidden)))
        row = in_a_row(singles)
        hidden = model.embed(row.ids_BT)
        ours = model.run_all(hidden, model.layer_context(hidden, lengths=row.in_a_row))
    expected = torch.cat(alone, dim=1)
    bound = 1e-5 if family.startswith("qwen3_5") else 2e-6
    assert (ours - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "method", "k"),
    [
        ("llama", "lopt", 2),
        ("llama", "e2e", 1),
        ("gemma2", "lopt", 2),
        ("qwen3_5_text", "lopt", 2),
        ("mistral", "frozen", 2),
    ],
)
def test_gradients_of_a_row_are_those_of_its_sequences(four_bit, family, method, k):
    folder = four_bit(family, num_hidden_layers=4, **changes_of(family))
    singles = rows_of(LENGTHS)
    bench = make_bench(folder, method=method, num_segments=k, n_micro_batches=len(singles))
    expected, alone = bench.gradients(singles), bench.result
    packed = make_bench(folder, method=method, num_segments=k)
    ours = packed.gradients([in_a_row(singles)])
    assert packed.result.totals == alone.totals
    assert packed.result.loss == pytest.approx(alone.loss, rel=1e-5)
    assert packed.result.local_loss == pytest.approx(alone.local_loss, rel=1e-5)
    for name, gradient in ours.items():
        assert expected[name].norm() > 0, f"{name} is zero: the test would prove nothing"
        assert (gradient - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_5_text"])
def test_a_row_equals_one_graph_over_it_bitwise(four_bit, family):
    bench = make_bench(four_bit(family, num_hidden_layers=4, **changes_of(family)), num_segments=2, dropout=0.2)
    row = in_a_row(rows_of(LENGTHS))
    ours = bench.gradients([row], step=3)
    embed, layer_context = bench.model.embed, bench.model.layer_context
    bench.model.layer_context = lambda hidden: layer_context(hidden, lengths=row.in_a_row)
    bench.model.clock.step, bench.model.clock.active = 3, True
    reference_loss(bench, [row]).backward()
    bench.model.clock.active = False
    assert embed is not None
    for name, theirs in bench.take_gradients().items():
        assert ours[name].abs().max() > 0, f"{name} is zero: the test would prove nothing"
        assert torch.equal(ours[name], theirs), name


def test_a_row_of_one_sequence_is_that_sequence(four_bit):
    bench = make_bench(four_bit("mistral", num_hidden_layers=4, sliding_window=64), num_segments=2)
    single = rows_of((40,))
    expected, loss = bench.gradients(single), bench.result
    ours = bench.gradients([in_a_row(single)])
    assert bench.result == loss
    for name, gradient in ours.items():
        assert torch.equal(gradient, expected[name]), name


def test_what_lies_beside_a_sequence_does_not_reach_it(four_bit):
    """Other tokens before it in the row: its own outputs are the same to the last bit."""
    model = make_bench(four_bit("qwen3_5_text", num_hidden_layers=4, **DELTA)).model
    found = []
    for seed in (1, 2):
        row = in_a_row([*rows_of((70, 5), seed=seed), *rows_of((20,), seed=9)])
        with torch.no_grad():
            hidden = model.embed(row.ids_BT)
            found.append(model.run_all(hidden, model.layer_context(hidden, lengths=row.in_a_row))[0])
    assert not torch.equal(found[0][:75], found[1][:75])
    assert torch.equal(found[0][75:], found[1][75:])


def test_a_boundary_cache_holds_the_same_rows(tmp_path):
    lengths = (3, 5, 2)
    hidden = torch.randn(1, 10, 4)
    cache = FeatureCache(tmp_path, identity={}, lengths=lengths, width=4)
    cache.write((2, 0, 1), hidden, packed=True)
    how = {"device": torch.device("cpu"), "dtype": torch.float32}
    back = cache.read((2, 0, 1), n_tokens=10, packed=True, **how)
    assert torch.equal(back, hidden.bfloat16().float())
    padded = cache.read((0, 1), n_tokens=5, **how)
    assert torch.equal(padded[0, :3], back[0, 2:5])
    assert torch.equal(padded[1], back[0, 5:])
    assert torch.equal(padded[0, 3:], torch.zeros(2, 4))
    cache.close()
