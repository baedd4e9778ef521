"""Objectives of preferences: gradients and losses equal those of one autograd graph of their formulas, in plain torch.

The reference runs layers and head whole, takes a log-softmax over the vocabulary, sums each reply's log-probabilities, and
writes each paper's formula down once more. Bounds: the loss within 1e-5, each gradient within 2e-5 of its norm (law 2's);
in bfloat16 within 3e-2 of its norm, the rounding of the products that both take (1.8e-2 was measured), the loss as before.
Accumulation over micro-batches equals the one big batch (law 5), and planned bytes equal tracked ones (law 6).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from lopt_edge.objectives import OBJECTIVES
from lopt_edge.objectives.labelled import baseline
from lopt_edge.objectives.objective import Scored, Window
from lopt_edge.run.step.batches import Batch, Choices, window_totals
from lopt_edge.run.step.preference_loss import choice_losses, log_probs
from tests.laws.bench import BASELINE, Bench, as_choices, in_a_row, make_bench, random_batch

DEPTH, TILE = 4, 16
SETTINGS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.05},
    "orpo": {"orpo_lambda": 0.4},
    "kto": {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7},
}


def objective(name: str):
    return replace(OBJECTIVES[name], settings=SETTINGS[name])


def sums_of(bench: Bench, batch: Batch) -> torch.Tensor:
    """The log-probabilities of the replies, by one graph."""
    model = bench.model
    model.clock.micro_batch = 0
    hidden = model.embed(batch.ids_BT)
    frame = model.layer_context(hidden, lengths=batch.in_a_row)
    for segment in bench.plan.segments:
        hidden = hidden.detach()
        for layer in segment.layers:
            hidden = model.run_layer(layer, hidden, frame)
    rows = model.norm(hidden).flatten(0, 1)[batch.supervised_N]
    matrix = model.lm_head.rows(torch.arange(model.facts.vocab_size))
    chosen = torch.log_softmax((rows @ matrix.t()).float(), dim=1).gather(1, batch.targets_N.unsqueeze(1)).squeeze(1)
    return torch.stack([part.sum() for part in chosen.split(list(batch.choices.n_targets))])


def formula(name: str, sums: torch.Tensor, batch: Batch, window) -> torch.Tensor:
    """The loss as its paper writes it (lopt_edge/objectives says which)."""
    s, r, n = sums, torch.tensor(batch.choices.reference), torch.tensor(batch.choices.n_targets)
    given = SETTINGS[name]
    if name == "kto":
        wanted, sign = torch.tensor(batch.choices.preferred), torch.tensor(batch.choices.preferred).float() * 2 - 1
        weight = torch.where(wanted, given["desirable_weight"], given["undesirable_weight"])
        return (weight * (1 - torch.sigmoid(sign * given["beta"] * (s - r - window.baseline)))).sum() / window.n_units
    if name == "orpo":
        mean = s / n
        odds = mean - torch.log1p(-torch.exp(mean))
        ratio = -logsigmoid(odds[::2] - odds[1::2]).sum() / window.n_units
        return -s[::2].sum() / window.n_preferred_targets + given["orpo_lambda"] * ratio
    rewards = given["beta"] * (s - r if name == "dpo" else s / n)
    z, e = rewards[::2] - rewards[1::2] - given.get("simpo_gamma", 0.0), given["label_smoothing"]
    return -((1 - e) * logsigmoid(z) + e * logsigmoid(-z)).sum() / window.n_units


@pytest.fixture(scope="module")
def folder(four_bit):
    return four_bit("llama", num_hidden_layers=DEPTH)


def made(folder, name: str, **options) -> Bench:
    bench = make_bench(folder, **({"method": "e2e"} | options))
    bench.executor.losses.objective = objective(name)
    return replace(bench, plan=replace(bench.plan, tile=TILE))


def assert_equal(ours, theirs) -> None:
    assert ours.keys() == theirs.keys() and ours
    for parameter, gradient in ours.items():
        difference = (gradient - theirs[parameter]).norm()
        assert gradient.norm() > 0 and difference <= 2e-5 * gradient.norm(), (parameter, float(difference))


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_one_graph(folder, name):
    """Of a padded micro-batch whose replies end inside tiles, end to end; of labelled rows in a row (packing), too."""
    bench, padded = made(folder, name), random_batch((13, 9, 11, 16), seed=1)
    packed = in_a_row([random_batch((length,), seed=length) for length in (13, 9, 11)])
    for batch in [as_choices(padded, name)] + [as_choices(packed, name)] * (name == "kto"):
        ours = bench.gradients([batch])
        loss = formula(name, sums_of(bench, batch), batch, window_totals([batch]).window)
        loss.backward()
        assert bench.result.loss == pytest.approx(loss.item(), abs=1e-5)
        assert_equal(ours, bench.take_gradients())


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_one_graph_in_half_precision(folder, name):
    """The same in bfloat16, sums and slopes in float32."""
    bench, batch = made(folder, name, dtype=torch.bfloat16), as_choices(random_batch((13, 9, 11, 16), seed=1), name)
    ours = bench.gradients([batch])
    loss = formula(name, sums_of(bench, batch), batch, window_totals([batch]).window)
    loss.backward()
    theirs = bench.take_gradients()
    assert bench.result.loss == pytest.approx(loss.item(), abs=1e-5) and ours.keys() == theirs.keys()
    for parameter, gradient in ours.items():
        assert gradient.norm() > 0 and (gradient - theirs[parameter]).norm() <= 3e-2 * gradient.norm(), parameter


def test_the_last_segment_alone_learns_preferences(folder):
    """With a boundary the gradient ends there; the frozen segment before has none."""
    bench, batch = made(folder, "dpo", method="frozen"), as_choices(random_batch((13, 9), seed=1), "dpo")
    ours = bench.gradients([batch])
    formula("dpo", sums_of(bench, batch), batch, window_totals([batch]).window).backward()
    theirs = {name: parameter.grad for name, parameter in bench.names().items()}
    assert_equal(ours, theirs)
    assert all(name.split()[1] in ("2", "3") for name in ours)


@pytest.mark.parametrize("name", SETTINGS)
def test_accumulation_equals_the_big_batch(folder, name):
    """Two uneven micro-batches, the sums that are measured among them, equal one; held-out losses are the same numbers."""
    bench = made(folder, name, n_micro_batches=2)
    parts = [
        as_choices(random_batch(lengths, seed=seed), name, seed=seed) for seed, lengths in enumerate([(13, 9), (7, 16)])
    ]
    whole = random_batch((13, 9), seed=0), random_batch((7, 16), seed=1)
    big = as_choices(joined(*whole), name)
    references = sum((part.choices.reference for part in parts), ())
    big = replace(big, choices=replace(big.choices, reference=references))
    apart = bench.gradients(parts)
    result = bench.result
    at_once = made(folder, name)
    assert_equal(apart, at_once.gradients([big]))
    assert result.loss == pytest.approx(at_once.result.loss, abs=1e-5)
    assert result.choices == pytest.approx(at_once.result.choices, abs=1e-4)
    found = choice_losses(bench.model, objective(name), parts, window_totals(parts), token_tile=TILE, between=lambda: None)
    assert found.pop("loss") == pytest.approx(result.loss, abs=1e-5)
    assert found == pytest.approx(result.choices, abs=1e-4)
    assert ("rewards_accuracy" in found) == OBJECTIVES[name].paired


def joined(first: Batch, second: Batch) -> Batch:
    """Two batches as one, padded to the longer."""
    n_tokens = max(first.ids_BT.shape[1], second.ids_BT.shape[1])
    ids = torch.zeros(4, n_tokens, dtype=torch.int64)
    supervised, targets = [], []
    for at, batch in ((0, first), (2, second)):
        rows, width = batch.ids_BT.shape
        ids[at : at + rows, :width] = batch.ids_BT
        supervised += [(position // width + at) * n_tokens + position % width for position in batch.supervised_N.tolist()]
        targets += batch.targets_N.tolist()
    lengths = first.lengths + second.lengths
    real = [row * n_tokens + at for row, length in enumerate(lengths) for at in range(length)]
    return Batch(ids, torch.tensor(supervised), torch.tensor(targets), torch.tensor(real), sum(lengths), lengths)


def test_log_probabilities_and_the_baseline(folder):
    """Those of a forward pass are those of one graph; the baseline is their mean share above the reference, at least 0."""
    bench, batch = made(folder, "kto"), as_choices(random_batch((13, 9, 11), seed=4), "kto")
    found = log_probs(bench.model, batch, batch.choices.n_targets, token_tile=TILE)
    assert found == pytest.approx(sums_of(bench, batch).tolist(), abs=1e-4)
    assert baseline((-3.0, -5.0), (-4.0, -5.5)) == 0.75 and baseline((-3.0,), (-2.0,)) == 0.0
    assert baseline((), ()) == 0.0


def test_slopes_are_those_of_autograd_where_it_is_steep():
    """Far from 0 and next to certainty, where naive formulas overflow: finite, and what float64 autograd gives."""
    sums = torch.tensor([-2e-3, -4000.0, -1e-2, -700.0], dtype=torch.float64)
    for name in SETTINGS:
        numbers = tuple(Scored(value, 4, place % 2 == 0, -50.0) for place, value in enumerate(sums.tolist()))
        window = Window(len(numbers) // OBJECTIVES[name].together, 8, BASELINE)
        judged, leaf = objective(name).judged(numbers, window), sums.clone().requires_grad_()
        fake = Choices((True, False) * 2, (4,) * 4, OBJECTIVES[name].together, (-50.0,) * 4, BASELINE)
        loss = formula(name, leaf, replace(random_batch((5,)), choices=fake), window)
        loss.backward()
        assert judged.loss == pytest.approx(loss.item(), rel=1e-6), name
        assert judged.slopes == pytest.approx(leaf.grad.tolist(), rel=1e-5, abs=1e-12), name
