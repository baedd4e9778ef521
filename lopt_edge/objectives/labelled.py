"""Objectives over single replies that a label calls desirable or not.

KTO (arXiv 2402.01306, eqs. 7 and 8). With s = log p(reply | prompt), summed over the reply's tokens, r the same under the
reference (the base, adapters off), N replies in the accumulation window:
    z0 = max(0, mean over the window of [s' - r']),   s' of each prompt with the reply of another row; no gradient
    desirable:     loss = w_D [1 - sigmoid(beta (s - r - z0))] / N
    undesirable:   loss = w_U [1 - sigmoid(beta (z0 - s + r))] / N;     reward = beta (s - r)

Where we deviate. The mismatched reply is the one of the row before (the first row's is the last one's), fixed for the run,
so that its reference is computed once; TRL shifts inside each batch of the device. z0 is that of the whole window, found by
a forward pass before the step, so accumulation equals the one big batch (design law 5); TRL takes each micro-batch's own,
which says nothing where that has one row.
"""

from __future__ import annotations

from collections.abc import Mapping

from lopt_edge.objectives.objective import Judged, Objective, Scored, Window, sigmoid


def _kto(unit: tuple[Scored, ...], settings: Mapping[str, float], window: Window) -> Judged:
    (one,) = unit
    beta, sign = settings["beta"], 1 if one.preferred else -1
    weight = settings["desirable_weight" if one.preferred else "undesirable_weight"] / window.n_units
    share = one.log_prob - one.reference
    value = sigmoid(sign * beta * (share - window.baseline))
    return Judged(weight * (1 - value), (-sign * weight * beta * value * (1 - value),), (beta * share,))


def baseline(log_probs: tuple[float, ...], references: tuple[float, ...]) -> float:
    """z0 of mismatched replies, from their summed log-probabilities under the model and under the reference."""
    shares = [log_prob - reference for log_prob, reference in zip(log_probs, references, strict=True)]
    return max(0.0, sum(shares) / max(1, len(shares)))


KTO = Objective(
    "kto",
    False,
    _kto,
    {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    reads_reference=True,
    compares=True,
)
