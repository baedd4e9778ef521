"""Differences paired by seed: their mean and interval, and what has no pair."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lopt_edge.comparison.figures import Outcome, Row
from lopt_edge.comparison.paired import difference, differences, paired_table
from lopt_edge.comparison.plots import dots, rate_curves


def row(name: str, losses: dict[int, float | None], *, tuning: dict[float, tuple[float, float]] | None = None) -> Row:
    def outcome(seed: int, lr: float, **figures: float | None) -> Outcome:
        return Outcome(SimpleNamespace(seed=seed, lr=lr, name=name), figures, {})

    tuned = [outcome(0, lr, eval_loss=loss, forgetting=lost) for lr, (loss, lost) in (tuning or {}).items()]
    runs = [outcome(seed, 1e-3, eval_loss=loss, forgetting=loss) for seed, loss in losses.items()]
    return Row(name, name, 1e-3, tuple(runs), tuple(tuned))


def test_the_interval_is_students_over_the_seeds_that_both_have():
    first, other = row("e2e", {0: 1.0, 1: 2.0, 2: 3.0, 7: 9.0}), row("frozen", {0: 1.1, 1: 2.3, 2: 3.2, 3: 5.0})
    found = difference(other, first, "eval_loss")
    assert (found.mean, found.n) == (pytest.approx(0.2), 3)
    assert found.half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3), "their own spread is ten times as large"
    assert difference(row("x", {0: 2.0}), first, "eval_loss").text("eval_loss") == "+1.0000"
    assert difference(row("x", {3: 2.0}), first, "eval_loss") is None
    assert difference(row("x", {0: None}), first, "eval_loss") is None


def test_the_table_is_of_all_but_the_first():
    rows = [row("e2e", {0: 1.0, 1: 2.0}), row("frozen", {0: 1.5, 1: 2.5}), row("not run", {})]
    assert list(differences(rows)) == ["frozen"] and not paired_table(rows[:1])
    assert paired_table(rows)[1] == ["frozen", "2", "+0.5000 ± 0.0000", "+0.5000 ± 0.0000"]


def test_the_front_passes_by_what_another_beats_and_rates_make_a_line():
    rows = [row(name, {0: 1.0 + i, 1: 1.0 + i}) for i, name in enumerate("abc")]
    assert "front" not in dots(rows, across="forgetting", upwards="eval_loss", front=True), "one beats all"
    tuned = [row("a", {}, tuning={1e-3: (3.0, 0.1), 1e-2: (2.0, 0.5)}), row("b", {}, tuning={1e-3: (1.0, 1.0)})]
    picture = rate_curves(tuned)
    assert picture.count("<polyline") == 1 and "lr 0.001 forgetting 0.1000 loss 3.0000" in picture
    assert rate_curves(rows) == ""
